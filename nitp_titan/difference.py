"""The difference of two measurements, with its standard error or its interval. Imports no torch."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

ENOUGH_PAIRS = 3
"""The least number of pairs with which a bootstrap interval is more than the two values themselves."""

_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A measurement minus that of the baseline.

    Args:
        value: the difference, in the unit of the measurement.
        pairs: observations that both have in common (documents, seeds) and that are subtracted one by one. 0 if the
            two measurements count as independent, which overstates the error.
        stderr: standard error of ``value``; None if it is unknown.
        interval: 95% interval of ``value``; None if it is unknown.
    """

    value: float
    pairs: int
    stderr: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and zero is not in it."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def mean_difference(differences: Sequence[float]) -> Difference:
    """Mean of the differences of pairs, with its bootstrap interval."""
    return Difference(value=fmean(differences), pairs=len(differences), interval=bootstrap_interval(differences))


def bootstrap_interval(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float] = fmean
) -> tuple[float, float] | None:
    """95% percentile bootstrap interval of a statistic, seeded; None for fewer than `ENOUGH_PAIRS` values.

    Source: Efron 1979.
    """
    if len(values) < ENOUGH_PAIRS:
        return None
    generator = random.Random(0)
    resampled = sorted(statistic(generator.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return resampled[round(0.025 * (_RESAMPLES - 1))], resampled[round(0.975 * (_RESAMPLES - 1))]
