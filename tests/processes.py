"""Processes that tests start: new ones, or forks of a process that has imported TorchTitan already."""

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
_ONE_RANK = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# What a trainer in this process has set for itself.
_OF_A_TRAINER = ("TORCH_FR_", "TORCH_NCCL_")


# Below the ports that Linux gives to whoever asks for any: some wait for minutes until a process opens them.
_ports = count(10_000 + os.getpid() * 61 % 15_000)


def free_port() -> int:
    """A port that is free and no other test of this process gets."""
    while True:
        with socket.socket() as trial, suppress(OSError):
            trial.bind(("localhost", port := next(_ports)))
            return port


def environment(**variables: str) -> dict[str, str]:
    """Variables of a process that is no rank yet."""
    own = [key for key in os.environ if key in _ONE_RANK or key.startswith(_OF_A_TRAINER)]
    return {key: value for key, value in os.environ.items() if key not in own} | variables


def torchrun(num_ranks: int, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a module or script under torchrun, in the project; returns the finished process with its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)]
    command += ["--master_port", str(free_port()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**variables), cwd=PROJECT)


def warm_ranks(num_ranks: int, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """As `torchrun`, without its start and 10 s of imports: for tests of what ranks do, not of how they start."""
    alike = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    alike |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "TORCHELASTIC_RESTART_COUNT": "0"}
    alike |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "0", "GROUP_RANK": "0"}
    environments = [
        environment(**alike, RANK=str(rank), LOCAL_RANK=str(rank), **variables) for rank in range(num_ranks)
    ]
    return _warm(arguments, environments, PROJECT)


def warm_python(*arguments: str, preload: tuple[str, ...] = (), env=None, cwd=None) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`, with TorchTitan imported.

    For a command whose start in a new process another test proves.
    """
    return _warm(arguments, [dict(os.environ if env is None else env)], cwd or os.getcwd(), preload)


_server: subprocess.Popen | None = None
_log = None


def _warm(arguments, environments, folder, preload=()) -> subprocess.CompletedProcess:
    global _server, _log
    if _server is None or _server.poll() is not None:
        command = [sys.executable, str(Path(__file__).with_name("warm.py"))]
        _log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        # With one thread, since forks have only one. Of its own group: Ctrl-C in pytest is not for it.
        _server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=_log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=PROJECT,
            process_group=0,
        )
        atexit.register(_stop, _server)
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        request = {
            "arguments": [str(argument) for argument in arguments],
            "environments": environments,
            "folder": str(folder),
            "out": out.name,
            "err": err.name,
            "preload": list(preload),
        }
        try:
            print(json.dumps(request), file=_server.stdin, flush=True)
            answer = _server.stdout.readline()
        except BaseException:
            # A test that ran out of time leaves nothing behind.
            os.killpg(_server.pid, 9)
            _server.wait()
            raise
        assert answer, f"tests/warm.py has ended: {_read(_log)[-3000:]}"
        statuses = json.loads(answer)
        status = statuses[0] if len(statuses) == 1 else int(any(statuses))
        return subprocess.CompletedProcess(list(arguments), status, out.read(), err.read())


def _stop(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait()
    server.stdout.close()


def _read(file) -> str:
    file.seek(0)
    return file.read()
