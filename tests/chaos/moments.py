"""Moments of a training run or an export, as its log and its files show them from outside."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chaos.process_tree import ProcessTree
from chaos.same_run import complete_checkpoints

KEEP_LATEST_K = 2
# Empty files in a checkpoint that is about to be removed: of hundreds of ranks it has as many.
_BALLAST = 4000


class Watch:
    """What a running command shows from outside.

    Args:
        tree: the command, whose log is ``log``.
        folder: holds the run folder, ``run``, and the export, ``hf``.
        num_ranks: of the training.
        checkpoints: steps after which it writes one.
    """

    def __init__(self, tree: ProcessTree, log: Path, folder: Path, num_ranks: int, checkpoints: list[int]):
        self.tree, self.num_ranks, self.checkpoints = tree, num_ranks, checkpoints
        self.checkpoint_folder, self.export = folder / "run/checkpoint", folder / "hf"
        self.started = time.monotonic()
        self.text = ""
        self.steps: set[int] = set()
        """That this start has logged."""
        self.writing: set[int] = set()
        """Of the checkpoints whose writing has left something in the folder."""
        self.complete: set[int] = set()
        self.loaded_down = False
        """Whether a checkpoint was given many files more."""
        self.ballast = 0
        """Number of these files now."""
        self.killed = False
        self.exited = False
        """By itself."""
        self._log, self._read = log, 0
        self._ranks: dict[int, int] = {}
        self._ranks_due = 0.0

    def look(self) -> None:
        with self._log.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        text = new.decode("utf-8", errors="replace")
        self.text += text
        self.steps |= {int(step) for step in re.findall(r" - step (\d+)/", text)}
        self.exited = self.exited or (not self.killed and self.tree.exit_status is not None)
        if not self.checkpoint_folder.is_dir():
            return
        found = (re.search(r"step-(\d+)", name) for name in os.listdir(self.checkpoint_folder))
        self.writing = {int(name[1]) for name in found if name}
        self.complete = complete_checkpoints(self.checkpoint_folder, self.num_ranks)
        if self.loaded_down:
            self.ballast = self._count_ballast()

    def ranks(self) -> dict[int, int]:
        """`ProcessTree.ranks`, looked for a few times a second until all are there, for it takes a while."""
        if len(self._ranks) < self.num_ranks and time.monotonic() > self._ranks_due:
            self._ranks, self._ranks_due = self.tree.ranks(), time.monotonic() + 0.2
        return self._ranks

    @property
    def training(self) -> bool:
        return "Training starts at step" in self.text

    @property
    def loaded(self) -> set[int]:
        """Steps of the checkpoints that this start has loaded."""
        return {int(step) for step in re.findall(r"Loading the checkpoint from .*step-(\d+)", self.text)}

    def error(self) -> str:
        """The last line of the log that says why the command failed."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        told = [line for line in lines if re.match(r"error: |(\[rank\d+\]: ?)?\w*(Error|Exception)\b", line)]
        return (told or lines or ["its log is empty"])[-1]

    def load_down(self, folder: Path) -> None:
        """Put many files into a checkpoint that is about to be removed, so that this takes a while."""
        for number in range(_BALLAST):
            (folder / f"ballast_{number}").touch()
        self.loaded_down, self.ballast = True, _BALLAST

    def _count_ballast(self) -> int:
        total = 0
        for folder in self.checkpoint_folder.iterdir():
            try:
                total += sum(name.startswith("ballast_") for name in os.listdir(folder))
            except OSError:
                continue
        return total


@dataclass(frozen=True)
class Moment:
    """A window of time, seen from outside.

    Args:
        opens, closes: of what is watched and the step of a checkpoint.
        steps: for which checkpoints it exists, of those ahead and those that are complete; without, it has to do with
            none, and its step is 0.
        before: done at every look until it opens.
    """

    opens: Callable[[Watch, int], bool]
    closes: Callable[[Watch, int], bool]
    steps: Callable[[list[int], set[int]], list[int]] | None = None
    before: Callable[[Watch, int], None] = lambda watch, step: None


def _ahead(ahead: list[int], complete: set[int]) -> list[int]:
    return ahead


def _last(ahead: list[int], complete: set[int]) -> list[int]:
    return ahead[-1:]


def _purging(ahead: list[int], complete: set[int]) -> list[int]:
    """After the last checkpoint TorchTitan removes nothing; after the one before the run would soon be over."""
    return [step for number, step in enumerate(ahead[:-2]) if len(complete) + number >= KEEP_LATEST_K]


def _load_down(watch: Watch, step: int) -> None:
    """Long before it is removed, or files that come while it is would keep its folder."""
    removed = [other for other in watch.checkpoints if other <= step][-1 - KEEP_LATEST_K]
    if not watch.loaded_down and removed in watch.complete:
        watch.load_down(watch.checkpoint_folder / f"step-{removed}")


def _draft(export: Path) -> Path:
    """Where the export writes before it is complete."""
    return export.with_name(f".{export.name}.incomplete")


MOMENTS = {
    "start": Moment(lambda w, _: True, lambda w, _: w.training),
    "first step": Moment(lambda w, _: w.training, lambda w, _: bool(w.steps)),
    "before a checkpoint": Moment(lambda w, s: s - 1 in w.steps, lambda w, s: s in w.writing, _ahead),
    "during a checkpoint write": Moment(
        lambda w, s: s in w.steps and s in w.writing, lambda w, s: s in w.steps and s in w.complete, _ahead
    ),
    "after a checkpoint": Moment(
        lambda w, s: s in w.steps and s in w.complete, lambda w, s: s + 1 in w.steps or w.exited, _ahead
    ),
    "during the purge": Moment(
        lambda w, _: w.loaded_down and w.ballast < _BALLAST,
        lambda w, _: w.loaded_down and w.ballast == 0,
        _purging,
        _load_down,
    ),
    "last step": Moment(lambda w, s: s - 1 in w.steps, lambda w, s: w.exited, _last),
    "during export": Moment(lambda w, _: _draft(w.export).exists(), lambda w, _: w.export.exists()),
    "any": Moment(lambda w, _: True, lambda w, _: w.exited),
}
