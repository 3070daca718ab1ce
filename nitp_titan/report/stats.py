"""Statistics of a comparison: smoothing, the phases of the NITP loss, paired bootstrap intervals."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from nitp_titan.report.runs import (
    common_steps,
    Run,
    Series,
    Variant,
)

# Share of the run that the "final" values average over: single batches are noisy.
FINAL_SHARE = 0.1
_SMOOTHING_SHARE = 0.04
_RESAMPLES = 10_000
# The least number of pairs with which an interval is more than the two values themselves.
ENOUGH_PAIRS = 3


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving average over a fixed share of the run; narrower at its start, where losses move fast.

    Values that are not finite stay as they are and count in no average.
    """
    widest = max(1, round(len(values) * _SMOOTHING_SHARE / 2))
    finite = [math.isfinite(value) for value in values]
    sums = [0.0, *accumulate(value if is_finite else 0.0 for value, is_finite in zip(values, finite))]
    counts = [0, *accumulate(finite)]
    averages = []
    for index, value in enumerate(values):
        half = min(widest, index // 4)
        low, high = index - half, min(len(values), index + half + 1)
        averages.append((sums[high] - sums[low]) / (counts[high] - counts[low]) if finite[index] else value)
    return averages


def phases(steps: Sequence[int], values: Sequence[float]) -> dict[str, tuple[int, float]] | None:
    """The three phases of the NITP loss (Fig. 5): where it starts, its low, its hump and its end.

    Returns:
        ``{"start", "collapse", "hump", "end"}`` -> (step, smoothed value; the start is not
        smoothed): the collapse is the minimum of the first half, the hump the maximum after it.
        None if there is no collapse, to less than half of the start, no hump of at least twice the
        collapse, or a value is not finite.
    """
    if len(values) < 3 or not all(map(math.isfinite, values)):
        return None
    smooth = smoothed(values)
    middle = len(smooth) // 2
    low = min(range(middle + 1), key=smooth.__getitem__)
    hump = max(range(low, len(smooth)), key=smooth.__getitem__)
    if smooth[low] >= values[0] / 2 or smooth[hump] < 2 * smooth[low]:
        return None
    marks = {"start": 0, "collapse": low, "hump": hump, "end": len(smooth) - 1}
    return {name: (steps[index], smooth[index] if name != "start" else values[0]) for name, index in marks.items()}


def final_mean(series: Series) -> float | None:
    """Mean over the last tenth of a series."""
    _, values = series
    return fmean(values[-_final_count(values) :]) if values else None


def _final_count(values: Sequence) -> int:
    return max(1, round(len(values) * FINAL_SHARE))


def last(series: Series) -> float | None:
    return series[1][-1] if series[1] else None


@dataclass(frozen=True)
class Stat:
    """A final stat of a run, and how it is shown."""

    name: str
    form: str
    series: Callable[[Run], Series]
    averaged: bool = False
    """Whether it is the mean over the last steps, as single batches are noisy, and not the last value."""

    compared: bool = True
    """Whether a difference of variants means something about training."""

    def steps(self, runs: Sequence[Run]) -> list[int]:
        """Steps that the stat is made from, the same for all runs that have it."""
        common = common_steps(self.series(run) for run in runs)
        return common[-_final_count(common) :] if self.averaged else common[-1:]

    def of(self, run: Run, steps: Sequence[int]) -> float | None:
        """Value of a run, from `steps`; None if the run lacks it."""
        values = dict(zip(*self.series(run)))
        return fmean(values[step] for step in steps) if steps and values.keys() >= set(steps) else None


TOKENS = Stat("tokens", ",.0f", lambda run: run.series("tokens"), compared=False)
STATS = [
    Stat("NTP loss", ".4f", lambda run: run.series("ntp_loss"), averaged=True),
    Stat("validation NTP loss", ".4f", lambda run: run.validation_series()),
    Stat("NITP loss", ".4f", lambda run: run.series("nitp_loss"), averaged=True, compared=False),
    Stat("effective rank", ".1f", lambda run: run.geometry_series("hidden", "effective_rank"), averaged=True),
    Stat("cosine", ".3f", lambda run: run.geometry_series("hidden", "cosine"), averaged=True),
    Stat("validation effective rank", ".1f", lambda run: run.validation_geometry_series("hidden", "effective_rank")),
    Stat("validation cosine", ".3f", lambda run: run.validation_geometry_series("hidden", "cosine")),
]


@dataclass(frozen=True)
class Difference:
    """Mean difference of a variant to the baseline over runs of the same seed."""

    value: float
    pairs: int
    interval: tuple[float, float] | None
    """95% bootstrap interval over pairs; None with fewer than `ENOUGH_PAIRS`."""

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def difference(variant: Variant, baseline: Variant, stat: Stat, steps: Sequence[int]) -> Difference | None:
    """Paired difference ``variant - baseline`` of a final stat at the same steps; None without a pair.

    Runs of the same seed are a pair; where no seed is known, runs in their order.
    """
    values = [
        (ours, theirs)
        for run, other in paired(variant, baseline)
        if (ours := stat.of(run, steps)) is not None and (theirs := stat.of(other, steps)) is not None
    ]
    differences = [ours - theirs for ours, theirs in values]
    if not differences:
        return None
    return Difference(fmean(differences), len(differences), bootstrap_interval(differences))


def paired(variant: Variant, baseline: Variant) -> list[tuple[Run, Run]]:
    """Runs of both variants with the same seed."""
    if any(run.seed is None for run in (*variant.runs, *baseline.runs)):
        return list(zip(variant.runs, baseline.runs))
    by_seed = {run.seed: run for run in baseline.runs}
    return [(run, by_seed[run.seed]) for run in variant.runs if run.seed in by_seed]


def bootstrap_interval(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float] = fmean
) -> tuple[float, float] | None:
    """95% percentile bootstrap interval (Efron 1979), seeded; None for fewer than `ENOUGH_PAIRS` values."""
    if len(values) < ENOUGH_PAIRS:
        return None
    generator = random.Random(0)
    found = sorted(statistic(generator.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return found[round(0.025 * (_RESAMPLES - 1))], found[round(0.975 * (_RESAMPLES - 1))]
