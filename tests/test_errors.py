"""How every command ends: what the machine does to it in one line, Ctrl-C, a closed pipe, several ranks."""

import errno
import json
import os
import subprocess
import sys

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from processes import PROJECT
from torch import OutOfMemoryError
from torch.distributed.checkpoint.api import CheckpointException

from nitp_titan.errors import at, UserError
from nitp_titan.files import read_own
from nitp_titan.machine.exits import end
from nitp_titan.machine.failures import chain, lost_rank, surroundings


def _os_error(number, file=None):
    return OSError(number, os.strerror(number), file)


def _caused(error, cause):
    error.__cause__ = cause
    return error


def _while_handling(error, context):
    error.__context__ = context
    return error


def _answer(kind, status):
    request = httpx.Request("GET", "https://huggingface.co/a/b")
    return kind("no", response=httpx.Response(status, request=request))


CAUSES = {
    "disk full": (_os_error(errno.ENOSPC, "run/metrics.jsonl"), "run/metrics.jsonl cannot be used: the disk is full."),
    "disk full, no file": (_os_error(errno.ENOSPC), "the disk is full."),
    "quota": (_os_error(errno.EDQUOT, "x"), "x cannot be used: the disk quota is used up."),
    "ulimit": (_os_error(errno.EFBIG, "x"), "x cannot be used: the file is larger than this file system or"),
    "read-only": (_os_error(errno.EROFS, "x"), "x cannot be used: the file system is read-only."),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "x"), "x cannot be used: permission denied."),
    "cache": (
        _os_error(errno.EROFS, "/cache/hf/datasets/json/0.lock"),
        "the cache /cache/hf/datasets/json/0.lock cannot be used: the file system is read-only. HF_HOME names another",
    ),
    "no home": (RuntimeError("Could not determine home directory."), "there is no home folder for caches; set HF_HOME"),
    "wrapped": (
        _caused(RuntimeError("An error occurred while generating the dataset"), _os_error(errno.ENOSPC, "x.arrow")),
        "x.arrow cannot be used: the disk is full.",
    ),
    "met while handling": (_while_handling(AttributeError("close"), _os_error(errno.EIO, "x")), "x cannot be used: "),
    "checkpoint": (
        CheckpointException("write", {1: (_os_error(errno.ENOSPC, "step-3/__1_0.distcp"), None)}),
        "step-3/__1_0.distcp cannot be used: the disk is full.",
    ),
    "in the way": (FileExistsError(errno.EEXIST, "File exists", "logs"), "logs cannot be used: a file of this name is"),
    "renamed": (OSError(errno.EISDIR, "Is a directory", "x.1.tmp", None, "x"), "x cannot be used: this is a folder."),
    "Rust": (Exception("I/O error: No space left on device (os error 28)"), "the disk is full."),
    "text of a worker": (RuntimeError("in worker 1: OSError: [Errno 28] No space left on device"), "the disk is full."),
    "group": (ExceptionGroup("all", [_os_error(errno.ENOSPC, "x")]), "x cannot be used: the disk is full."),
    "memory": (MemoryError(), "the memory of this machine does not suffice"),
    "GPU": (OutOfMemoryError("CUDA out of memory. Tried"), "the memory of the GPU does not suffice"),
    "CPU": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
        "the memory of this machine does not suffice",
    ),
    "no network": (httpx.ConnectError("[Errno -2] Name or service not known"), "it does not answer (ConnectError: "),
    "refused": (_os_error(errno.ECONNREFUSED), "it does not answer (ConnectionRefusedError: "),
    "busy": (_answer(HfHubHTTPError, 429), "it asks to wait (429, too many requests)"),
    "gated": (_answer(GatedRepoError, 401), "access denied (401): it does not exist, or needs HF_TOKEN"),
    "down": (_answer(HfHubHTTPError, 503), "it answers with an error (503)"),
    "offline": (OfflineModeIsEnabled("no"), "is needed, and HF_HUB_OFFLINE forbids to ask for it."),
}


@pytest.mark.parametrize("name", CAUSES)
def test_what_the_machine_does_is_one_line_with_its_place(monkeypatch, name):
    monkeypatch.setenv("HF_HOME", "/cache/hf")
    error, message = CAUSES[name]
    line = str(surroundings(error))
    assert message in line and len(line.splitlines()) == 1, line


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyError("text"), FileNotFoundError(errno.ENOENT, "no", "x"), RuntimeError("28"), OSError("x")],
)
def test_other_errors_are_no_matter_of_the_machine(error):
    assert surroundings(error) is None


def test_a_suppressed_context_and_a_circle_are_no_cause():
    hidden = _while_handling(ValueError("x"), _os_error(errno.ENOSPC))
    hidden.__suppress_context__ = True
    assert surroundings(hidden) is None
    first, second = ValueError("1"), ValueError("2")
    first.__cause__, second.__cause__ = second, first
    assert chain(first) == [first, second]


def test_a_write_to_an_open_file_names_it():
    with pytest.raises(OSError) as error, at("run/metrics.jsonl"), open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    assert str(surroundings(error.value)) == "run/metrics.jsonl cannot be used: the disk is full."
    assert str(surroundings(_os_error(errno.ENOSPC), "outputs/run")) == "outputs/run cannot be used: the disk is full."


def test_who_lost_a_neighbour_is_told_from_who_fails():
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    assert lost_rank(gloo) and lost_rank(_caused(ValueError("x"), gloo))
    assert not lost_rank(RuntimeError("shape mismatch")) and not lost_rank(UserError("Connection closed by peer"))


COMMAND = """
import os, resource, signal, sys
from pathlib import Path
from nitp_titan.machine import exits
from nitp_titan.files import write_atomically

def main():
    if sys.argv[1] == "pipe":
        for line in range(100_000):
            print(line)
    if sys.argv[1] == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if sys.argv[1] == "disk":
        sys.stdout = open("/dev/full", "w")
        print("x" * 100)
    if sys.argv[1] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        write_atomically(Path(sys.argv[2]) / "scores.json", "x" * 100)
    if sys.argv[1] == "bug":
        raise KeyError("x")

exits.run(main, kept="finished tasks; the same command resumes", place="outputs")
"""


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("fine", 0, ""),
        ("pipe", 141, ""),
        ("interrupt", 130, "interrupted: finished tasks; the same command resumes\n"),
        ("disk", 1, "error: outputs cannot be used: the disk is full.\n"),
        (
            "limit",
            1,
            "error: {}/scores.json cannot be used: the file is larger than this file system or `ulimit -f` allows.\n",
        ),
        ("bug", 1, "KeyError: 'x'\n"),
    ],
)
def test_a_command_ends_with_one_line_and_its_status(tmp_path, end, status, said):
    command = [sys.executable, "-c", COMMAND, end, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT) as process:
        if end == "pipe":
            process.stdout.readline()
            process.stdout.close()
        written = process.stderr.read()
        assert written == said.format(tmp_path) or (end == "bug" and written.endswith(said)), written
        assert process.wait() == status
    assert list(tmp_path.iterdir()) == [], "nothing is left half-written"


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        _caused(UserError("x cannot be read: "), CheckpointException("read", {0: (KeyboardInterrupt(), None)})),
        _while_handling(AttributeError("'NoneType' object has no attribute 'terminate'"), KeyboardInterrupt()),
    ],
    ids=["itself", "failed checkpoint", "failed clean-up"],
)
def test_an_interruption_is_one_whatever_became_of_it(capsys, error):
    with pytest.raises(SystemExit) as ended:
        end(error, kept="nothing.")
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted: nothing.\n"


def test_a_damaged_file_of_ours_is_named_and_a_missing_one_is_none(tmp_path):
    assert read_own(tmp_path / "run.json") is None
    for content in ("{", "[1]", ""):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UserError, match=r"run\.json is damaged: .* Remove it, or choose another folder\.$"):
            read_own(tmp_path / "run.json")
    (tmp_path / "run.json").write_text('{"a": 1}')
    assert read_own(tmp_path / "run.json") == {"a": 1}


RANK = """
from nitp_titan.errors import UserError
from nitp_titan.machine.exits import exit_lost, exit_with
import sys
exit_lost() if sys.argv[1] == "lost" else exit_with(UserError(sys.argv[1]))
"""


def test_the_first_rank_of_a_node_says_why_and_torchrun_is_told_of_all(tmp_path):
    def end(rank, reason):
        file = tmp_path / f"attempt_0/{rank}/error.json"
        file.parent.mkdir(parents=True)
        environment = os.environ | {"RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(file)}
        done = subprocess.run([sys.executable, "-c", RANK, reason], capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        return done.stderr, json.loads(file.read_text())

    said, told = zip(*(end(rank, reason) for rank, reason in ((1, "bad"), (0, "bad"), (2, "lost"))))
    assert said == ("error: bad\n", "", "rank 2 ends, because another rank of this run has ended.\n")
    assert [entry["message"] for entry in told[:2]] == ["error: bad"] * 2
    assert told[2]["timestamp"] > told[1]["timestamp"], "torchrun takes the earliest for the reason"
