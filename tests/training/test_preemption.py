"""SIGTERM and Ctrl-C save and exit with a status of their own, torchrun's restarts resume; who loses a rank ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from processes import free_port, PROJECT, warm_ranks

from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.step_files import read_records
from nitp_titan.training.preemption import EXIT_PREEMPTED, PREEMPTED_FILE, PreemptionSignal

NUM_STEPS = 60
_SETTINGS = "training.seq_len", 128, "training.global_batch_size", 4, "training.local_batch_size", 2
_SETTINGS += "checkpoint.interval", 20, "metrics.log_freq", 1
SMALL = [f"--{part}" if index % 2 == 0 else str(part) for index, part in enumerate(_SETTINGS)]
SMALL += ["--validator.no-enable", "--geometry.no-enable"]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_one_rank_knows_of_its_signal_at_once_and_the_handler_is_put_back(monkeypatch, tmp_path, number, name):
    marker = tmp_path / "stopped"
    monkeypatch.setenv(PREEMPTED_FILE, str(marker))
    marker.touch()
    before = signal.getsignal(number)
    with PreemptionSignal(None) as stop:
        assert not marker.exists(), "a marker of an earlier start"
        assert not stop.should_stop()
        os.kill(os.getpid(), number)
        assert stop.should_stop() and stop.should_stop() and stop.reason == name
        stop.mark_saved()
    assert marker.exists()
    assert signal.getsignal(number) is before


# The main thread is in C for minutes, where no handler of Python runs.
TWICE = """
import hashlib, os, signal, threading, time
from nitp_titan.training import preemption

def send():
    for pause in (0.1, 0.1, 1.5):
        time.sleep(pause)
        print("sent", flush=True)
        os.kill(os.getpid(), signal.SIGINT)

preemption._SECONDS_PASSED_ON = 1
with preemption.PreemptionSignal(None):
    threading.Thread(target=send).start()
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
"""


def test_a_second_signal_ends_a_process_that_waits_for_a_device_but_one_that_was_passed_on_does_not():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, cwd=PROJECT, timeout=60)
    assert done.returncode == 130 and done.stdout == "sent\n" * 3
    assert done.stderr == "Ctrl-C again: training ends at once, and this step is not saved.\n"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("error", ["error: part-1.jsonl, line 7: no text."]),
        ("disk", ["error: part-1.arrow cannot be used: the disk is full."]),
        ("bug", ["[rank1]: ValueError: a bug of rank 1"]),
        ("killed", []),
        ("stuck", []),
    ],
)
def test_of_two_ranks_one_fails_and_says_why_and_the_other_ends_soon_with_one_line(torchrun, what, said):
    done = torchrun(2, "tests/runs/one_rank_fails.py", what)
    seconds = time.time() - float(re.search(r"at (\d+\.\d+)", done.stdout)[1])
    lines = done.stderr.partition(" closing signal ")[0].splitlines()
    told = [line for line in lines if re.match(r"error: |rank 0 ends|\[rank.\]: \w+Error", line)]
    end = "rank 0 ends, because another rank of this run has ended."
    assert done.returncode == 1 and told in ([*said, end], said), done.stderr
    assert not any(line.startswith("[rank0]") for line in lines)
    # torchrun itself waits for 30.
    assert seconds < 20
    root = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1 " in root and (what == "bug" or not said or said[0] in root)


def test_a_document_that_only_rank_1_cannot_read_ends_training_with_its_line_alone(assets, tmp_path):
    flags = ["--recipe", "debug/nitp_debug", "--train-config", "cpu", "--dump_folder", str(tmp_path / "run")]
    done = warm_ranks(2, "tests/runs/rank_1_fails.py", *flags, *SMALL, "--training.steps", "4")
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert [line for line in lines if line.startswith("error: ")] == ["error: part-1.jsonl, line 7: no text."]
    assert "Traceback" not in done.stderr and "Connection closed" not in done.stderr


def test_ranks_that_reach_the_end_wait_for_each_other():
    done = warm_ranks(2, "tests/runs/one_rank_fails.py", "nothing")
    assert done.returncode == 0 and sorted(done.stdout.splitlines()) == ["rank 0 is done", "rank 1 is done"]


class _Run:
    """Training on two ranks, started again and again with the same command."""

    def __init__(self, folder: Path):
        self.folder, self.output = folder, folder.parent / "log.txt"
        recipe = ["--recipe", "recipes/debug/nitp_debug.toml", "--dump_folder", str(folder)]
        self.flags = ["-m", "nitp_titan.train", *recipe, *SMALL, "--training.steps", str(NUM_STEPS)]

    def start(self, *launcher: str) -> subprocess.Popen:
        one_rank = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {key: value for key, value in os.environ.items() if key not in one_rank}
        command = [sys.executable, "-m", "nitp_titan.torchrun", "--nproc_per_node", "2"]
        command += ["--master_port", str(free_port()), *launcher, *self.flags]
        self.log = self.output.open("w")
        return subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd=PROJECT, env=environment)

    def wait_for_step(self, step: int, process: subprocess.Popen) -> None:
        while f" step {step}/{NUM_STEPS} " not in self.text():
            assert process.poll() is None, self.text()
            time.sleep(0.02)

    def text(self) -> str:
        return self.output.read_text()

    def steps(self) -> list[int]:
        return [record["step"] for record in read_records(self.folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory) -> _Run:
    return _Run(tmp_path_factory.mktemp("stopped") / "run")


def test_sigterm_saves_after_the_same_step_on_all_ranks_and_exits_with_its_status(run):
    process = run.start()
    run.wait_for_step(5, process)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_PREEMPTED, run.text()
    assert time.monotonic() - started < 15
    checkpoint = Checkpoint(run.folder)
    assert 5 <= checkpoint.step < 20, "no step of the interval"
    assert run.text().count(f"Stopped by SIGTERM after step {checkpoint.step};") >= 1
    assert checkpoint.has_optimizer and run.steps() == list(range(1, checkpoint.step + 1))
    # No warning comes more often than once from each rank.
    lines = [line for line in run.text().splitlines() if "warning" in line.lower()]
    warnings = Counter(line.partition("- WARNING - ")[2] for line in lines)
    assert warnings and max(warnings.values()) <= 2, warnings


def test_ctrl_c_saves_as_sigterm_does(run):
    process = run.start()
    run.wait_for_step(Checkpoint(run.folder).step + 3, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == EXIT_PREEMPTED, run.text()
    assert "Ctrl-C: this step is finished and saved; a second one ends training at once." in run.text()
    assert f"Stopped by Ctrl-C after step {Checkpoint(run.folder).step};" in run.text()
    assert "KeyboardInterrupt" not in run.text() and "Traceback" not in run.text()


def test_the_same_command_resumes_and_torchrun_restarts_it_when_a_rank_dies(run):
    stopped = Checkpoint(run.folder).step
    process = run.start("--max-restarts", "1")
    run.wait_for_step(45, process)
    assert f"Training starts at step {stopped + 1}" in run.text()
    workers = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    assert process.wait(timeout=120) == 0, run.text()[-3000:]
    assert re.findall(r"Training starts at step (\d+)", run.text())[-1] == "41"
    assert run.steps() == list(range(1, NUM_STEPS + 1))
    assert Checkpoint(run.folder).step == NUM_STEPS


def test_a_failure_is_no_stop():
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    command = [sys.executable, "-m", "nitp_titan.torchrun", "--nproc_per_node", "1", "-m", "nitp_titan.no_such_module"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment)
    assert done.returncode == 1 and "no_such_module" in done.stderr and "Traceback" not in done.stderr
