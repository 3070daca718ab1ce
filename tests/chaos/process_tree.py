"""A command with all the processes that come from it, which a kill of their parent does not hide. Linux only."""

import os
import secrets
import signal
import subprocess
import time
from pathlib import Path

from nitp_titan.errors import UserError

_MARK = "NITP_TITAN_PROCESS_TREE"


class ProcessTree:
    """Starts a command in a session of its own; used as a context, it ends whatever is left of it.

    Its processes are those that inherited a variable of its own, wherever they hang in the system's tree: what
    torchrun starts has a session of its own, and outlives it when it is killed.

    Args:
        command: what to start.
        log: file for all its output.
        variables: added to the environment.

    Raises:
        UserError: on a system that does not tell the environment of processes.
    """

    def __init__(self, command: list[str], log: Path, **variables: str):
        if not Path("/proc/self/environ").exists():
            raise UserError("this needs /proc, which Linux has, to find the processes that it starts.")
        mark = secrets.token_hex(8)
        self._mark = f"{_MARK}={mark}".encode()
        try:
            with log.open("wb") as output:
                self.root = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=os.environ | variables | {_MARK: mark},
                )
        except BaseException:
            # Interrupted when the command runs already, and before this can be used as a context.
            for pid in self.processes():
                self.kill(pid)
            raise

    def __enter__(self) -> "ProcessTree":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    @property
    def exit_status(self) -> int | None:
        """That of the command itself; None while it runs."""
        return self.root.poll()

    def processes(self) -> dict[int, dict[bytes, bytes]]:
        """Process id -> environment, of all that run."""
        pids = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
        return {pid: environment for pid in pids if (environment := self._environment(pid))}

    def _environment(self, pid: int) -> dict[bytes, bytes]:
        """Empty unless the process is one of ours."""
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            # Gone meanwhile, or of another user.
            return {}
        return dict(pair.split(b"=", 1) for pair in variables if b"=" in pair) if self._mark in variables else {}

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of torchrun's workers."""
        # Neither the launcher, which may have inherited a rank, nor a worker's children, which have its rank.
        others = {pid: env for pid, env in self.processes().items() if pid != self.root.pid}
        workers = {pid: int(env[b"RANK"]) for pid, env in others.items() if b"RANK" in env}
        return {rank: pid for pid, rank in workers.items() if _parent(pid) not in workers}

    def kill(self, pid: int) -> bool:
        """Send SIGKILL to one of the processes; whether it was still there."""
        # A process id may have become that of another process.
        if not self._environment(pid):
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def wait(self, seconds: float) -> bool:
        """Wait until no process is left; whether that was in time."""
        limit = time.monotonic() + seconds
        while self.exit_status is None or self.processes():
            if time.monotonic() >= limit:
                return False
            time.sleep(0.02)
        # The environment goes a moment before the last thread does.
        time.sleep(0.1)
        return True

    def end(self) -> None:
        """Kill what is left and wait until it is gone."""
        while not self.wait(0):
            for pid in self.processes():
                self.kill(pid)
            time.sleep(0.02)


def _parent(pid: int) -> int:
    try:
        # The name, in parentheses, may hold spaces.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
