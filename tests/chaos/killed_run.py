"""One trial: a command that is killed at given moments, and started again until it ends by itself."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

from chaos.moments import MOMENTS, Watch
from chaos.process_tree import ProcessTree
from chaos.same_run import complete_checkpoints
from chaos.trials import Kill, Trial

POLL_SECONDS = 0.001
# A start on two idle cores takes 15 s; torchrun waits 30 s for ranks that do not end.
LONGEST_START_SECONDS = 300
# How long an orphan may train on after its launcher was killed.
_LONGEST_ORPHAN_SECONDS = 3


@dataclass
class KilledRun:
    """Trains or exports in a folder: the run is ``<folder>/run``, the export ``<folder>/hf``, a log is ``start_N.log``.

    Args:
        command: what is started, each time the same.
        checkpoints: steps after which it writes one.
        lengths: moment and step of a checkpoint -> seconds that it lasts.
        variables: for the environment.
        draw: for moments and victims.
    """

    folder: Path
    command: list[str]
    num_ranks: int
    checkpoints: list[int]
    lengths: dict[tuple[str, int], float]
    variables: dict[str, str]
    draw: random.Random

    def complete(self) -> set[int]:
        """Steps of the checkpoints that are complete."""
        return complete_checkpoints(self.folder / "run/checkpoint", self.num_ranks)

    def go(self, trial: Trial, moments: list[str]) -> None:
        """Start, once for each moment with a kill and once more; the trial takes down what happens."""
        newest = None
        for moment in [*moments, None]:
            kill = self._start(trial, moment, newest)
            before, newest = newest, max(self.complete(), default=None)
            if before is not None and (newest or 0) < before:
                trial.problems.append(f"start {trial.starts}: the checkpoint of step {before} is gone")
            # One that ended before it could be killed is done.
            if trial.problems or kill is None or kill.seconds is None:
                break

    def _start(self, trial: Trial, moment: str | None, newest: int | None) -> Kill | None:
        """Start once and kill at the moment, if there is one; ``newest`` is the checkpoint that it must load."""
        trial.starts += 1
        kill, log = None, self.folder / f"start_{trial.starts}.log"
        with ProcessTree(self.command, log, **self.variables) as tree:
            watch = Watch(tree, log, self.folder, self.num_ranks, self.checkpoints)
            if moment is not None:
                kill = self._kill(watch, *self.drawn(moment, newest))
                trial.kills.append(kill)
            if not tree.wait(LONGEST_START_SECONDS):
                trial.problems.append(f"start {trial.starts} did not end within {LONGEST_START_SECONDS} s")
            watch.look()
        if kill is not None and kill.seconds is not None:
            # A process that outlives its launcher still runs; all others have ended.
            kill.hit = kill.hit or (kill.victim != "launcher" and not MOMENTS[kill.moment].closes(watch, kill.step))
        elif tree.exit_status != 0:
            trial.problems.append(f"start {trial.starts} ended with status {tree.exit_status}: {watch.error()}")
        trial.loaded.append(max(watch.loaded, default=None))
        # Before training starts it may not have come to loading.
        if (watch.training or watch.loaded) and watch.loaded != ({newest} - {None}):
            loaded = f"step {min(watch.loaded)}" if watch.loaded else "no checkpoint"
            wanted = "none was complete" if newest is None else f"that of step {newest} was complete"
            trial.problems.append(f"start {trial.starts} loaded {loaded}, but {wanted}")
        return kill

    def drawn(self, name: str, newest: int | None) -> tuple[Kill, float, float]:
        """The kill to come, where in its moment, as a share, and how long a launcher's orphans live, in seconds.

        As many numbers are drawn whatever happens, so that a seed means the same kills.
        """
        share, choice, orphan, who = (self.draw.random() for _ in range(4))
        victim, step = f"rank {self.draw.randrange(self.num_ranks)}", 0
        if MOMENTS[name].steps:
            ahead = [step for step in self.checkpoints if step > (newest or 0)]
            steps = MOMENTS[name].steps(ahead, self.complete())
            # After an earlier kill the moment may not come again.
            name, step = (name, steps[int(choice * len(steps))]) if steps else ("any", 0)
        if name == "during export":
            victim = "export"
        elif who < 0.3 and name in ("start", "first step", "last step", "any"):
            # At a moment shorter than the life of a launcher's orphans it would be unclear what was hit.
            victim = "launcher" if who < 0.15 else "all"
        return Kill(name, step, victim), share, orphan * _LONGEST_ORPHAN_SECONDS

    def _kill(self, watch: Watch, kill: Kill, share: float, orphan_seconds: float) -> Kill:
        """Wait for the moment and kill; the kill has no ``seconds`` if the command ended before, or took too long."""
        moment, tree = MOMENTS[kill.moment], watch.tree
        if not self._until_open(watch, kill):
            return kill
        # A moment may be over sooner than in the reference: what closes it is killed at once, or it would end unharmed.
        due = time.monotonic() + share * self.lengths.get((kill.moment, kill.step), 0.0)
        while time.monotonic() < due and not moment.closes(watch, kill.step):
            time.sleep(POLL_SECONDS)
            watch.look()
        rank = watch.ranks().get(int(kill.victim.removeprefix("rank "))) if kill.victim.startswith("rank ") else None
        if kill.victim.startswith("rank ") and rank is None:
            kill.victim = "launcher"
        pids = [tree.root.pid, *tree.processes()] if kill.victim == "all" else [rank or tree.root.pid]
        if not any([tree.kill(pid) for pid in pids]):
            return kill
        watch.killed, kill.seconds = True, round(time.monotonic() - watch.started, 3)
        if kill.victim == "launcher":
            watch.look()
            kill.hit = not moment.closes(watch, kill.step)
            # As a scheduler does it, which ends what the launcher leaves, some time later.
            if not tree.wait(orphan_seconds):
                tree.end()
        return kill

    def _until_open(self, watch: Watch, kill: Kill) -> bool:
        """Poll until the moment opens; False if the command ends before, or takes too long."""
        moment = MOMENTS[kill.moment]
        while time.monotonic() < watch.started + LONGEST_START_SECONDS:
            watch.look()
            if watch.exited:
                return False
            if moment.opens(watch, kill.step):
                return True
            watch.ranks()
            moment.before(watch, kill.step)
            time.sleep(POLL_SECONDS)
        return False
