"""What becomes of runs that are killed, trial by trial and moment by moment."""

from dataclasses import dataclass, field

from chaos.moments import MOMENTS

_MOST_PROBLEMS = 8


@dataclass
class Kill:
    """One SIGKILL."""

    moment: str
    step: int
    """Of the checkpoint that the moment has to do with, or 0."""
    victim: str
    hit: bool = False
    """Whether it came within its moment."""
    seconds: float | None = None
    """Since the start of the command; None where the command ended before."""

    def __str__(self) -> str:
        missed = " (ended before)" if self.seconds is None else "" if self.hit else " (missed)"
        return f"{self.moment}{f' of step {self.step}' if self.step else ''}, {self.victim}{missed}"


@dataclass
class Trial:
    """A run that was killed and started again until it ended."""

    number: int
    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    loaded: list[int | None] = field(default_factory=list)
    """Checkpoint that each start loaded."""
    problems: list[str] = field(default_factory=list)
    deviation: float = 0.0
    seconds: float = 0.0

    @property
    def hit(self) -> bool:
        """Whether all kills came within their moments."""
        return all(kill.hit for kill in self.kills)

    @property
    def survived(self) -> bool:
        """Whether it was killed at all and lost nothing."""
        return not self.problems and any(kill.seconds is not None for kill in self.kills)

    def __str__(self) -> str:
        steps = ["afresh" if step is None else f"from step {step}" for step in self.loaded[1:]]
        resumed = f", then {', '.join(steps)}" if any(self.loaded) else ""
        fate = f"LOST: {self.problems[0]}" if self.problems else "survived" if self.survived else "nothing was killed"
        return f"{'; '.join(map(str, self.kills))} | {fate} | {self.starts} starts{resumed}, {self.seconds:.0f} s"


def by_moment(trials: list[Trial]) -> dict[str, dict[str, int]]:
    """Moment -> kills that hit it, and how many of their trials survived or were lost.

    The row ``missed`` has the kills that came too early or too late for their moment.
    """
    rows = {}
    for trial in trials:
        kills = [kill for kill in trial.kills if kill.seconds is not None]
        # Lost before it could be killed.
        for kill in kills or (trial.kills[:1] if trial.problems else []):
            row = rows.setdefault(kill.moment if kill.hit else "missed", {"tried": 0, "survived": 0, "lost": 0})
            row["tried"] += 1
            row["lost" if trial.problems else "survived"] += 1
    return {name: rows[name] for name in (*MOMENTS, "missed") if name in rows}


def table(trials: list[Trial]) -> str:
    """`by_moment` as lines, and below them what was lost."""
    rows = [("moment", "tried", "survived", "lost")]
    rows += [(name, *map(str, row.values())) for name, row in by_moment(trials).items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lost = []
    for trial in trials:
        lost += [f"trial {trial.number}: {problem}" for problem in trial.problems[:_MOST_PROBLEMS]]
        if more := trial.problems[_MOST_PROBLEMS:]:
            lost.append(f"trial {trial.number}: and {len(more)} more")
    deviation = max((trial.deviation for trial in trials), default=0.0)
    equal = f"numbers differ from the reference by up to {deviation:.1e}" if deviation else "all numbers are equal"
    return "\n".join([*lines, *(lost or [equal])])
