"""Statistics of a comparison: smoothing, the phases of the NITP loss, final values and their differences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from nitp_titan.difference import Difference, mean_difference
from nitp_titan.report.runs import (
    common_steps,
    Run,
    Series,
    Variant,
)

FINAL_SHARE = 0.1
"""Share of the run that final means are taken over: single batches are noisy."""

_SMOOTHING_SHARE = 0.04


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving average over a fixed share of the run; narrower at its start, where losses move fast.

    Values that are not finite stay as they are and are left out of the averages.
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
    """The three phases of the NITP loss (Fig. 5): start, collapse, hump and end.

    Returns:
        ``{"start", "collapse", "hump", "end"}`` -> (step, smoothed value; the start is not smoothed). The collapse is
        the minimum of the first half, the hump the maximum after it. None if the loss does not fall below half of its
        start, does not rise to twice its minimum, or is not finite everywhere.
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
    """Mean over the last tenth of a series; None if it is empty."""
    _, values = series
    return fmean(values[-_final_count(values) :]) if values else None


def _final_count(values: Sequence) -> int:
    return max(1, round(len(values) * FINAL_SHARE))


def last(series: Series) -> float | None:
    """The last value of a series; None if it is empty."""
    return series[1][-1] if series[1] else None


@dataclass(frozen=True)
class Stat:
    """A number that a run ends with, and how it is shown.

    Args:
        name: heading of its column.
        format: format specification of its values.
        series: steps and values of a run.
        averaged: True for the mean over the last tenth of the steps, as single batches are noisy; False for the last
            value.
        compared: False where a difference of two variants says nothing about training.
    """

    name: str
    format: str
    series: Callable[[Run], Series]
    averaged: bool = False
    compared: bool = True

    def steps(self, runs: Sequence[Run]) -> list[int]:
        """Steps whose values count, the same for all runs that have any."""
        common = common_steps(self.series(run) for run in runs)
        return common[-_final_count(common) :] if self.averaged else common[-1:]

    def value(self, run: Run, steps: Sequence[int]) -> float | None:
        """Mean of a run's values at `steps`; None if one is missing."""
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


def difference(variant: Variant, baseline: Variant, stat: Stat, steps: Sequence[int]) -> Difference | None:
    """Mean of a statistic's differences ``variant - baseline`` over pairs of runs; None without a pair.

    Args:
        steps: from `Stat.steps` of all runs.
    """
    pairs = [(stat.value(run, steps), stat.value(reference, steps)) for run, reference in paired(variant, baseline)]
    differences = [current - reference for current, reference in pairs if current is not None and reference is not None]
    return mean_difference(differences) if differences else None


def paired(variant: Variant, baseline: Variant) -> list[tuple[Run, Run]]:
    """Runs of both variants with the same seed; where a seed is unknown, runs in their order."""
    if any(run.seed is None for run in (*variant.runs, *baseline.runs)):
        return list(zip(variant.runs, baseline.runs))
    by_seed = {run.seed: run for run in baseline.runs}
    return [(run, by_seed[run.seed]) for run in variant.runs if run.seed in by_seed]
