"""Scores and their differences, with standard errors. Pure arithmetic.

A score that is a ratio of sums over documents (a mean, nats per token, bits per byte) keeps each document's influence,
its share of the score's deviation. The influences of two models on the same documents subtract, which gives the paired
standard error of their difference; that of the score itself is the usual one (for a mean, deviation / sqrt(n)).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nitp_titan.difference import Difference


@dataclass(frozen=True)
class Score:
    """Result of one model on one task.

    Args:
        value: the result, in the unit of its metric; shares are from 0 to 1.
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


def difference(score: Score, baseline: Score) -> Difference | None:
    """Difference of two scores, paired by document where they have the same documents; None if their units differ."""
    if score.scale != baseline.scale:
        return None
    value = score.value - baseline.value
    if score.influence is None or baseline.influence is None or score.documents != baseline.documents:
        return Difference(value=value, pairs=0, stderr=root_sum_of_squares([score.stderr, baseline.stderr]))
    shares = [current - reference for current, reference in zip(score.influence, baseline.influence, strict=True)]
    return Difference(value=value, pairs=len(shares), stderr=_stderr(shares))


def combined(differences: Sequence[Difference], value: float, stderr: float | None) -> Difference:
    """A difference that others were combined into; paired if all of them are."""
    pairs = sum(each.pairs for each in differences) if all(each.pairs for each in differences) else 0
    return Difference(value=value, pairs=pairs, stderr=stderr)


def root_sum_of_squares(stderrs: Sequence[float | None]) -> float | None:
    """Standard error of a sum or difference of independent values; None if one of their errors is unknown."""
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
    """Mean of independent values, and its standard error."""
    error = root_sum_of_squares(stderrs)
    return math.fsum(values) / len(values), None if error is None else error / len(values)
