"""Start training runs as processes of their own, and recognise those that are finished. Imports no torch."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nitp_titan.config import recipe
from nitp_titan.errors import UserError
from nitp_titan.files import archive, read_own, write_atomically

_STAMP = "run.json"
# Training processes that threads of this process wait for.
_running: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class TrainingRun:
    """A training run on one rank, in a process of its own.

    Args:
        name: its name in messages.
        recipe: path of the recipe.
        train_config: path of the train config.
        folder: its run folder.
        flags: changes of single settings.
        data: what else decides the result, for example the hash of the corpus.
    """

    name: str
    recipe: Path
    train_config: Path
    folder: Path
    flags: list[str] = field(default_factory=list)
    data: object = None

    def command(self) -> list[str]:
        paths = (os.path.relpath(path) for path in (self.recipe, self.train_config))
        launcher = [sys.executable, "-m", "nitp_titan.torchrun", "--standalone", "--nproc_per_node", "1"]
        arguments = [part for pair in zip(("--recipe", "--train-config"), paths) for part in pair]
        return [*launcher, "-m", "nitp_titan.train", *arguments, "--dump_folder", str(self.folder), *self.flags]

    def fingerprint(self) -> str:
        """Hash of everything that decides the run's result."""
        settings = recipe.read_settings(self.recipe, self.train_config)
        return hashlib.sha256(repr((settings.tables, self.flags, self.data)).encode()).hexdigest()

    def finished(self) -> bool:
        return self._stamp() == {"fingerprint": self.fingerprint(), "finished": True}

    def train(self, log: Callable[[str], None]) -> None:
        """Train unless the run is finished; a stopped one resumes. The full log is ``<folder>/log.txt``.

        Args:
            log: called with a message for every logged step, and at start and end.

        Raises:
            UserError: if the folder holds something else, or training fails, with the reason.
            KeyboardInterrupt: once training has saved.
        """
        stamp, wanted = self._stamp(), self.fingerprint()
        if stamp == {"fingerprint": wanted, "finished": True}:
            return log(f"already trained ({self.folder})")
        if self.folder.exists() and not stamp:
            raise UserError(f"{self.folder} is not the folder of this run; choose another one with --out.")
        if self.folder.exists() and stamp["fingerprint"] != wanted:
            log(f"{self.folder} was trained with other settings; it is now {archive(self.folder)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_stamp(wanted, finished=False)
        log(" ".join(self.command()))
        started = time.monotonic()
        with (self.folder / "log.txt").open("a") as file:
            process = subprocess.Popen(self.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            _running.add(process)
            try:
                for line in process.stdout:
                    file.write(line)
                    _, is_step, rest = line.partition(" - step ")
                    if is_step:
                        log(f"step {rest.rstrip()}")
            except KeyboardInterrupt:
                log("is told to save and stop")
                stop_all()
                file.writelines(process.stdout)
                process.wait()
                raise
            finally:
                _running.discard(process)
        if process.wait() != 0:
            raise UserError(self._reason())
        self._write_stamp(wanted, finished=True)
        log(f"trained in {time.monotonic() - started:.0f} s")

    def _stamp(self) -> dict:
        return read_own(self.folder / _STAMP) or {}

    def _write_stamp(self, fingerprint: str, *, finished: bool) -> None:
        write_atomically(self.folder / _STAMP, json.dumps({"fingerprint": fingerprint, "finished": finished}))

    def _reason(self) -> str:
        lines = (self.folder / "log.txt").read_text().splitlines()
        reasons = [line for line in lines if line.startswith("error: ")] or lines[-15:]
        return "\n".join(reasons) + f"\ntraining of {self.name} failed; the whole log is {self.folder}/log.txt"


def stop_all() -> None:
    """Tell every training run of this process to save and stop, as Ctrl-C does.

    One that the terminal has told at the same moment counts both as one signal.
    """
    for process in list(_running):
        process.send_signal(signal.SIGINT)
