"""Server of `processes.warm_ranks` and `processes.warm_python`: processes that have imported TorchTitan already.

    python tests/warm.py

Reads a request a line from stdin, as JSON: ``arguments`` of Python, ``environments`` of the processes, ``folder`` and
the files ``out`` and ``err``. Every process is a fork of this one and ends as Python does; when one fails, the others
are ended, as torchrun does. Writes a line with the list of their exit statuses.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

# What most commands import, and takes seconds.
COMMON = [
    "nitp_titan.training.trainer",
    "torchtitan.train",
    "nitp_titan.config_registry",
    "torch.distributed.checkpoint",
]
GRACE = 30
"""Seconds between SIGTERM and SIGKILL for what is left of a failed launch, as under torchrun."""


def preload(names: list[str]) -> None:
    for name in names:
        importlib.import_module(name)
    # Forks do not look through what all of them have, nor copy it.
    gc.collect()
    gc.freeze()
    # A fork has none of the other threads. Only the allocator of Arrow has one, and can do without.
    names = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    others = sorted(names)
    others.remove(Path("/proc/self/comm").read_text().strip())
    assert set(others) <= {"jemalloc_bg_thd"}, others


def end_with_parent() -> None:
    """End this process when the one that started it has ended, for example by Ctrl-C in pytest."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def launch(request: dict) -> list[int] | None:
    """Exit statuses of the processes of a request; None in each of these processes."""
    running: dict[int, int] = {}
    for rank, environment in enumerate(request["environments"]):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            become(request, environment)
            return None
        running[child] = rank
    statuses = [0] * len(running)
    deadline = None
    while running:
        child, status = os.waitpid(-1, os.WNOHANG if deadline else 0)
        if child == 0:
            if time.monotonic() > deadline:
                _end(running, signal.SIGKILL)
            time.sleep(0.05)
            continue
        statuses[running.pop(child)] = os.waitstatus_to_exitcode(status)
        if any(statuses) and deadline is None:
            _end(running, signal.SIGTERM)
            deadline = time.monotonic() + GRACE
    return statuses


def _end(processes: dict[int, int], number: int) -> None:
    for process in processes:
        os.kill(process, number)


def become(request: dict, environment: dict[str, str]) -> None:
    """Make this fork look like a new process: its files, folder, variables, arguments and search path."""
    end_with_parent()
    for path, descriptor, flags in (
        (os.devnull, 0, os.O_RDONLY),
        (request["out"], 1, os.O_WRONLY | os.O_APPEND),
        (request["err"], 2, os.O_WRONLY | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(environment)
    arguments = request["arguments"]
    if arguments[0] in ("-m", "-c"):
        sys.argv[:] = ["-c" if arguments[0] == "-c" else arguments[1], *arguments[2:]]
        sys.path[0] = os.getcwd()
    else:
        sys.argv[:] = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[1:1] = added
    importlib.invalidate_caches()
    # As torchrun starts them.
    if len(request["environments"]) > 1:
        sys.stdout.reconfigure(write_through=True)


def serve() -> list[str] | None:
    """Answer requests until there is none; in a process of a request: the arguments that it was started with."""
    end_with_parent()
    preload(COMMON)
    for line in sys.stdin:
        request = json.loads(line)
        if request["preload"]:
            preload(request["preload"])
        statuses = launch(request)
        if statuses is None:
            return request["arguments"]
        print(json.dumps(statuses), flush=True)
    return None


if __name__ == "__main__":
    started = serve()
    if started and started[0] == "-m":
        runpy.run_module(started[1], run_name="__main__", alter_sys=True)
    elif started and started[0] == "-c":
        exec(compile(started[1], "<string>", "exec"), {"__name__": "__main__"})
    elif started:
        runpy.run_path(started[0], run_name="__main__")
