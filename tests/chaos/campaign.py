"""Kill training with SIGKILL at chosen moments, start the same command again, and see whether anything was lost.

All is seen from outside: the log, the files and the exit status of unchanged commands. Imports no torch.
"""

import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from chaos.killed_run import KilledRun, LONGEST_START_SECONDS, POLL_SECONDS
from chaos.moments import KEEP_LATEST_K, MOMENTS, Watch
from chaos.process_tree import ProcessTree
from chaos.same_run import compare
from chaos.trials import Trial
from nitp_titan.config import recipe
from nitp_titan.errors import nearest_choice, UserError
from nitp_titan.files import sha256

# Of a moment that was missed.
_ATTEMPTS = 4
_OF_EXPORT = ("during export",)


@dataclass(frozen=True)
class CampaignSettings:
    """What is trained and how it is killed.

    Raises:
        UserError: naming the option and what is allowed.
    """

    recipe: str = "debug/nitp_debug"
    train_config: str = "cpu"
    num_ranks: int = 1
    asynchronous: bool = False
    steps: int = 15
    interval: int = 3
    """Steps between checkpoints, of which two are kept."""
    kills: int = 1
    """Per trial."""
    moments: tuple[str, ...] = ()
    """Keys of `MOMENTS`; none means all."""
    seed: int = 0
    tolerance: float = 0.0
    """As in `same_run.compare`."""

    def __post_init__(self) -> None:
        for name in self.moments:
            if name not in MOMENTS:
                raise UserError(f"--moment '{name}': there is no such moment.{nearest_choice(name, list(MOMENTS))}")
        for option, value, allowed in (
            ("--ranks", self.num_ranks, (1, 2, 4)),
            ("--interval", self.interval, range(2, self.steps + 1)),
            # Enough checkpoints that one is removed, even where they are written in the background.
            ("--steps", self.steps, range(self.interval * (KEEP_LATEST_K + 3), 1000)),
            ("--kills", self.kills, range(1, 11)),
        ):
            if value not in allowed:
                text = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) and allowed else "1, 2 or 4"
                raise UserError(f"{option} {value}: it must be {text}.")
        if not 0 <= self.tolerance < 1:
            raise UserError(f"--tolerance {self.tolerance}: it must be at least 0 and below 1.")

    @property
    def checkpoints(self) -> list[int]:
        """Steps after which a checkpoint is written."""
        return sorted({*range(self.interval, self.steps + 1, self.interval), self.steps})

    def train_command(self, folder: Path) -> list[str]:
        """Small batches, for imports take longer than the steps; all that writes files is on, at the same steps too."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        paths = (recipe.find(self.recipe, "recipes"), recipe.find(self.train_config, "train_configs"))
        flags = {
            "dump_folder": folder,
            "training.steps": self.steps,
            "training.global_batch_size": 4,
            "training.local_batch_size": 4 // self.num_ranks,
            "checkpoint.interval": self.interval,
            "checkpoint.keep_latest_k": KEEP_LATEST_K,
            "checkpoint.async_mode": "async" if self.asynchronous else "disabled",
            "validator.freq": 2,
            "validator.steps": 1,
            "geometry.interval": 2,
            "metrics.log_freq": 1,
        }
        arguments = ["--recipe", str(paths[0]), "--train-config", str(paths[1])]
        arguments += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        return [*launcher, "--nproc_per_node", str(self.num_ranks), "-m", "nitp_titan.train", *arguments]


class Campaign:
    """Trials against one run that nothing stops, in a folder of their own.

    Args:
        settings: the same for all.
        out: folder; must not exist yet, or be empty.
        log: takes a line for whatever takes long.

    Raises:
        UserError: if the folder is in the way.
    """

    def __init__(self, settings: CampaignSettings, out: Path, log: Callable[[str], None] = lambda line: None):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} exists already; choose another folder or remove it.")
        self.settings, self.out, self.log = settings, out.absolute(), log
        self.reference = self.out / "reference"
        self.moments = list(settings.moments or MOMENTS)
        self.lengths: dict[tuple[str, int], float] = {}
        """Moment and step of a checkpoint -> seconds that it lasted in the reference."""
        # One thread, as torchrun gives to each of several ranks: cores may have other things to do.
        self.variables = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

    def run_reference(self) -> None:
        """Train once without a kill, measure how long each moment lasts, and export it if that is a moment.

        Raises:
            UserError: if this fails, with the reason.
        """
        self.reference.mkdir(parents=True, exist_ok=True)
        self._uninterrupted("train", [name for name in MOMENTS if name not in _OF_EXPORT])
        if any(name in _OF_EXPORT for name in self.moments):
            self._uninterrupted("export", list(_OF_EXPORT))

    def trials(self, number: int) -> Iterator[Trial]:
        """Trials until ``number`` of them were killed at their moments; those that missed it come as well.

        A moment that is missed is tried again, within bounds.
        """
        shuffled = random.Random(self.settings.seed)
        rounds = [shuffled.sample(self.moments, len(self.moments)) for _ in range(0, number, len(self.moments))]
        numbers = count(1)
        for index, moment in enumerate([name for names in rounds for name in names][:number]):
            for attempt in range(_ATTEMPTS):
                # Of its own, so that a trial is the same whatever became of those before.
                draw = random.Random(f"{self.settings.seed} {index} {attempt}")
                same = [name for name in self.moments if (name in _OF_EXPORT) == (moment in _OF_EXPORT)]
                moments = [moment, *draw.choices(same, k=self.settings.kills - 1)]
                trial = self.trial(next(numbers), moments, draw)
                yield trial
                if trial.hit or trial.problems:
                    break

    def _command(self, job: str, folder: Path) -> list[str]:
        if job == "train":
            return self.settings.train_command(folder / "run")
        script = recipe.PROJECT / "scripts/export_hf.py"
        return [sys.executable, str(script), "--checkpoint", str(self.reference / "run"), "--out", str(folder / "hf")]

    def _uninterrupted(self, job: str, moments: list[str]) -> None:
        command, log = self._command(job, self.reference), self.reference / f"{job}.log"
        self.log(" ".join(command))
        checkpoints = self.settings.checkpoints
        keys = [(name, step) for name in moments for step in (checkpoints if MOMENTS[name].steps else [0])]
        opened: dict[tuple[str, int], float] = {}
        with ProcessTree(command, log, **self.variables) as tree:
            watch = Watch(tree, log, self.reference, self.settings.num_ranks, checkpoints)
            while not watch.exited:
                watch.look()
                now = time.monotonic()
                for name, step in keys:
                    if (name, step) not in opened and MOMENTS[name].opens(watch, step):
                        opened[name, step] = now
                    if (name, step) in opened and MOMENTS[name].closes(watch, step):
                        self.lengths.setdefault((name, step), now - opened[name, step])
                if now > watch.started + LONGEST_START_SECONDS:
                    raise UserError(f"the {job} without a kill takes too long; its log is {log}")
                time.sleep(POLL_SECONDS)
        watch.look()
        if tree.exit_status != 0:
            raise UserError(f"the {job} without a kill failed: {watch.error()}\nits log is {log}")
        self.log(f"took {now - watch.started:.0f} s")

    def trial(self, number: int, moments: list[str], draw: random.Random) -> Trial:
        """Kill once at each of the moments, in this order, either all of training or all of an export.

        Args:
            number: names the folder, which is kept if something was lost.
            draw: for checkpoints, victims and times.
        """
        trial, begun, folder = Trial(number), time.monotonic(), self.out / f"trial_{number:03}"
        folder.mkdir()
        exports = moments[0] in _OF_EXPORT
        run = KilledRun(
            folder=folder,
            command=self._command("export" if exports else "train", folder),
            num_ranks=self.settings.num_ranks,
            checkpoints=self.settings.checkpoints,
            lengths=self.lengths,
            variables=self.variables,
            draw=draw,
        )
        run.go(trial, moments)
        if not trial.problems and exports:
            trial.problems = _compare_exports(self.reference / "hf", folder / "hf")
        elif not trial.problems:
            comparison = compare(self.reference / "run", folder / "run", tolerance=self.settings.tolerance)
            trial.problems, trial.deviation = comparison.problems, comparison.deviation
        trial.seconds = round(time.monotonic() - begun, 1)
        if not trial.problems:
            shutil.rmtree(folder)
        return trial


def _compare_exports(reference: Path, folder: Path) -> list[str]:
    expected, found = ({path.name: sha256(path) for path in each.iterdir()} for each in (reference, folder))
    names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    left = sorted(path.name for path in folder.parent.iterdir() if path.name.startswith("."))
    return [f"{name} of the export differs" for name in names] + [f"{name} is left" for name in left]
