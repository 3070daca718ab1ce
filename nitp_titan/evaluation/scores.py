"""Scores with standard errors, and differences with theirs. Pure arithmetic.

A score that is a ratio of sums over documents (a mean, nats per token, bits per byte) keeps each document's influence,
its share of the score's deviation. The influences of two models on the same documents subtract, which gives the paired
standard error of their difference; that of the score itself is the usual one (for a mean, deviation / sqrt(n)).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Score:
    """Score of one model on one task.

    Args:
        value: the score, in the unit of its metric; shares are from 0 to 1.
        stderr: its standard error, or None if it is unknown.
        size: documents that it is made from.
        higher_is_better: direction of the metric.
        documents: identity of the documents in their order; scores of the same documents are paired.
        influence: one number per document, whose squares sum up to stderr^2 (n - 1) / n; None if it is unknown.
        scale: identity of the unit where two models can differ in it, such as nats per token of a tokenizer.
    """

    value: float
    stderr: float | None
    size: int
    higher_is_better: bool = True
    documents: str = ""
    influence: list[float] | None = None
    scale: str = ""

    def exp(self) -> "Score":
        """The score's exponential, a perplexity of nats."""
        value = math.exp(self.value)
        stderr = None if self.stderr is None else value * self.stderr
        influence = None if self.influence is None else [value * share for share in self.influence]
        return replace(self, value=value, stderr=stderr, influence=influence)


def ratio(numerators: Sequence[float], denominators: Sequence[float], **fields) -> Score:
    """Score ``sum(numerators) / sum(denominators)`` over documents, with the standard error of a ratio estimator.

    Args:
        numerators, denominators: one number per document; denominators of 1 make it a mean.
        fields: further fields of the `Score`.

    Source: linearisation of a ratio, e.g. Cochran 1977, Sampling Techniques, section 6.4.
    """
    total = math.fsum(denominators)
    value = math.fsum(numerators) / total
    influence = [(above - value * below) / total for above, below in zip(numerators, denominators, strict=True)]
    stderr = _stderr(influence)
    return Score(value=value, stderr=stderr, size=len(influence), influence=influence, **fields)


def _stderr(influence: Sequence[float]) -> float | None:
    n = len(influence)
    return math.sqrt(n / (n - 1) * math.fsum(share * share for share in influence)) if n > 1 else None


@dataclass(frozen=True)
class ScoreDifference:
    """A model's score minus the baseline's, on the same documents where it is paired.

    Args:
        value: the difference, in the unit of the score.
        stderr: its standard error, or None if it is unknown.
        paired: whether the standard error is that of differences on the same documents; else the two scores count as
            independent, which overstates it.
    """

    value: float
    stderr: float | None
    paired: bool


def difference(score: Score, baseline: Score) -> ScoreDifference | None:
    """Difference of two scores; None if their units differ."""
    if score.scale != baseline.scale:
        return None
    value = score.value - baseline.value
    if score.influence is None or baseline.influence is None or score.documents != baseline.documents:
        return ScoreDifference(value, root_sum_of_squares([score.stderr, baseline.stderr]), paired=False)
    shares = [ours - theirs for ours, theirs in zip(score.influence, baseline.influence, strict=True)]
    return ScoreDifference(value, _stderr(shares), paired=True)


def root_sum_of_squares(stderrs: Sequence[float | None]) -> float | None:
    """Standard error of a sum or difference of independent scores; None if one of theirs is unknown."""
    return None if None in stderrs else math.sqrt(math.fsum(stderr**2 for stderr in stderrs))


def pooled(
    values: Sequence[float], stderrs: Sequence[float | None], sizes: Sequence[int]
) -> tuple[float, float | None]:
    """Mean over subtasks weighted by their documents, with its standard error from the pooled variance.

    Source: `pooled_sample_stderr` of lm-evaluation-harness, which aggregates its groups in the same way.
    """
    total = sum(sizes)
    value = math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / total
    if len(values) == 1:
        return value, stderrs[0]
    if None in stderrs or total <= len(sizes):
        return value, None
    squares = math.fsum((size - 1) * size * stderr**2 for size, stderr in zip(sizes, stderrs, strict=True))
    return value, math.sqrt(squares / (total - len(sizes)) / total)


def mean(values: Sequence[float], stderrs: Sequence[float | None]) -> tuple[float, float | None]:
    """Mean of independent scores, and its standard error."""
    error = root_sum_of_squares(stderrs)
    return math.fsum(values) / len(values), None if error is None else error / len(values)
