"""Geometry of a cloud of hidden states (Section 5, App. D). Pure functions; imports torch only.

Everything is computed from sums over tokens, in float64: sums of micro-batches and of ranks simply add up.

Suffixes: N tokens, D model dim, P pairs, S sequences.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows of states that are held in float64 at a time.
_BLOCK = 4096
# At most so many eigenvalues are kept of a spectrum, spaced evenly on a log scale of their rank.
_SPECTRUM_POINTS = 128


@dataclass
class Moments:
    """Sums over tokens from which all statistics but sampled pairs follow. Memory: dim^2 numbers."""

    counts: Tensor
    """[2], float64: tokens, and tokens whose state is not zero."""

    sum_D: Tensor
    direction_D: Tensor
    """Sum of the states' directions x / |x|; a zero state has none and adds zero."""

    outer_DD: Tensor
    """Sum of x x^T, without mean-centring."""

    @classmethod
    def zeros(cls, dim: int, device: torch.device | str = "cpu") -> "Moments":
        sizes = ((2,), (dim,), (dim,), (dim, dim))
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, x_ND: Tensor, valid_N: Tensor) -> None:
        """Add the valid ones of some tokens.

        Args:
            x_ND: states, [tokens, dim], any floating type.
            valid_N: tokens that count, [tokens], bool.
        """
        for x, valid in zip(x_ND.split(_BLOCK), valid_N.split(_BLOCK)):
            x = torch.where(valid[:, None], x.double(), 0.0)
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            self.counts += torch.stack([valid.sum(), (norm > 0).sum()])
            self.sum_D += x.sum(0)
            self.direction_D += torch.where(norm > 0, x / norm.clamp(min=torch.finfo(x.dtype).tiny), 0.0).sum(0)
            self.outer_DD.addmm_(x.T, x)

    def tensors(self) -> list[Tensor]:
        """The sums; adding those of two disjoint sets of tokens gives those of both."""
        return [self.counts, self.sum_D, self.direction_D, self.outer_DD]


def covariance(moments: Moments) -> Tensor:
    """Covariance of the mean-centred states, [dim, dim], float64; zero without a token."""
    count = moments.counts[0].clamp(min=1)
    mean = moments.sum_D / count
    return moments.outer_DD / count - torch.outer(mean, mean)


def spectrum(second_moment_DD: Tensor, scale: Tensor | None = None) -> Tensor:
    """Eigenvalues of a second moment, largest first; what is below rounding is zero.

    Args:
        second_moment_DD: symmetric, positive semidefinite up to rounding, [dim, dim], float64.
        scale: size of the numbers that it was computed from, scalar; by default its trace. For a
            covariance pass the trace of the moment before centring, whose rounding it inherits.

    Returns:
        [dim], float64, none negative.
    """
    eigenvalues = torch.linalg.eigvalsh(second_moment_DD).flip(0)
    scale = second_moment_DD.trace() if scale is None else scale
    rounding = torch.finfo(second_moment_DD.dtype).eps * second_moment_DD.shape[0] * scale
    return torch.where(eigenvalues > rounding, eigenvalues, 0.0)


def effective_rank(spectrum_D: Tensor) -> Tensor:
    """Number of directions that a cloud of states really uses: exp(entropy of the normalised spectrum).

    Args:
        spectrum_D: eigenvalues of the covariance, not negative, [dim].

    Returns:
        Scalar without a unit, 1 to dim; 0 for a spectrum of zeros, a cloud that is a point.

    Source: Roy & Vetterli 2007; NITP App. D.
    """
    total = spectrum_D.sum()
    share = spectrum_D / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, torch.special.entr(share).sum().exp(), 0.0)


def rankme(second_moment_spectrum_D: Tensor) -> Tensor:
    """Effective rank from the singular values of the states themselves, without mean-centring.

    Args:
        second_moment_spectrum_D: eigenvalues of the mean of x x^T, [dim]; the singular values of
            the [tokens, dim] matrix of states are proportional to their square roots.

    Source: Garrido et al. 2023 (RankMe), without its additive 1e-7.
    """
    return effective_rank(second_moment_spectrum_D.sqrt())


def participation_ratio(spectrum_D: Tensor) -> Tensor:
    """(sum of eigenvalues)^2 / sum of their squares, of the covariance; 0 for a spectrum of zeros."""
    squares = spectrum_D.square().sum()
    return torch.where(squares > 0, spectrum_D.sum().square() / torch.where(squares > 0, squares, 1.0), 0.0)


def average_cosine(moments: Moments) -> Tensor:
    """Mean cosine over all pairs of different tokens, in closed form; 0 with fewer than two tokens.

    With s the sum of n directions it is (|s|^2 - n) / (n (n - 1)). A pair with a zero state counts as 0.
    """
    tokens, nonzero = moments.counts
    pairs = tokens * (tokens - 1)
    total = moments.direction_D.square().sum() - nonzero
    return torch.where(pairs > 0, total / pairs.clamp(min=1), 0.0).clamp(-1, 1)


def sampled_cosine(first_PD: Tensor, second_PD: Tensor, valid_P: Tensor) -> Tensor:
    """Mean cosine of sampled pairs (App. D); 0 without a valid pair.

    Args:
        first_PD, second_PD: both tokens of every pair, [pairs, dim].
        valid_P: pairs that count, [pairs], bool.
    """
    cosine = torch.nn.functional.cosine_similarity(first_PD.double(), second_PD.double(), dim=-1)
    return torch.where(valid_P, cosine, 0.0).sum() / valid_P.sum().clamp(min=1)


def sample_pairs(lengths_S: Tensor, num_pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random pairs of tokens of different sequences, all such pairs alike (App. D).

    They are of one sequence if there is no other.

    Args:
        lengths_S: tokens of every sequence, int64, at least 2 in all.

    Returns:
        Number of the sequence and position in it, both [2 pairs], int64: first tokens, then second tokens.
    """
    if (lengths_S > 0).sum() == 1:
        only = lengths_S.argmax()
        positions, _ = sample_pairs(torch.ones(int(lengths_S[only]), dtype=torch.int64), num_pairs, seed)
        return only.expand_as(positions), positions
    generator = torch.Generator().manual_seed(seed)
    ends_S = lengths_S.cumsum(0)
    starts_S, num_tokens = ends_S - lengths_S, ends_S[-1]

    def below(highs_P: Tensor) -> Tensor:
        return (torch.rand(num_pairs, dtype=torch.float64, generator=generator) * highs_P).long()

    # A sequence is the first of as many pairs as it has tokens times those of all others.
    num_pairs_S = lengths_S.double() * (num_tokens - lengths_S)
    first_P = torch.multinomial(num_pairs_S, num_pairs, replacement=True, generator=generator)
    own_P = lengths_S[first_P]
    other_P = below(num_tokens - own_P)
    other_P += torch.where(other_P >= starts_S[first_P], own_P, 0)
    second_P = torch.searchsorted(ends_S, other_P, right=True)
    return torch.cat([first_P, second_P]), torch.cat([below(own_P), other_P - starts_S[second_P]])


def describe(moments: Moments, pairs: tuple[Tensor, Tensor, Tensor] | None = None) -> dict[str, Any] | None:
    """All statistics of a cloud of states, as plain numbers.

    Args:
        moments: of all its tokens.
        pairs: arguments of `sampled_cosine`.

    Returns:
        Statistic -> number; ``spectrum`` has the share of the variance by rank, for up to 128 ranks.
        None if the states are not finite.
    """
    if not all(tensor.isfinite().all() for tensor in moments.tensors()):
        return None
    count = moments.counts[0].clamp(min=1)
    second_moment = moments.outer_DD / count
    eigenvalues = spectrum(covariance(moments), scale=second_moment.trace())
    stats = {
        "effective_rank": effective_rank(eigenvalues),
        "rankme": rankme(spectrum(second_moment)),
        "participation_ratio": participation_ratio(eigenvalues),
        "cosine": average_cosine(moments),
    }
    if pairs is not None:
        stats["cosine_sampled"] = sampled_cosine(*pairs)
    share = eigenvalues / eigenvalues.sum().clamp(min=torch.finfo(eigenvalues.dtype).tiny)
    ranks = _log_spaced(len(share))
    return {
        "tokens": int(moments.counts[0]),
        **{name: value.item() for name, value in stats.items()},
        "spectrum": {"rank": ranks, "share": [float(f"{value:.4g}") for value in share.cpu()[torch.tensor(ranks) - 1]]},
    }


def _log_spaced(dim: int) -> list[int]:
    """Up to `_SPECTRUM_POINTS` ranks from 1 to ``dim``."""
    points = torch.logspace(0, 1, _SPECTRUM_POINTS, base=dim, dtype=torch.float64).round().int().tolist()
    return sorted(set(points)) if dim > 1 else [1]
