"""The generic cosine regulariser of the paper's ablation (Table 3, after Gao et al. 2019): no target and no projector.

It only pushes the hidden states of a sequence apart. Suffixes: B batch, L (local) length, D model dim.
"""

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn as nn
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX

from nitp_titan.objectives.distances import direction
from nitp_titan.objectives.nitp import IdentityProjector, NITPModule
from nitp_titan.objectives.objective import context_parallel_group, local, Microbatch, MicrobatchTerms, Objective


def direction_sums(h_BLD: Tensor, valid_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the directions of a sequence's valid hidden states, and their number.

    Returns:
        [batch, dim] float32 and [batch] float32. Both add up over chunks and ranks.
    """
    unit_BLD = direction(h_BLD.float())[0] * valid_BL[..., None]
    return unit_BLD.sum(1), valid_BL.sum(1, dtype=torch.float32)


def cosine_regularizer_sum(h_BLD: Tensor, valid_BL: Tensor, directions_BD: Tensor, counts_B: Tensor) -> Tensor:
    """Share of some positions in the mean cosine between different tokens of a sequence.

    Over n unit vectors x_i with sum s the mean over ordered pairs is (|s|^2 - n) / (n (n - 1)), so position i
    contributes (x_i . s - 1) / (n (n - 1)) to the value, while its gradient is 2 s / (n (n - 1)): every pair contains
    it twice. That needs s, but no second state.

    Args:
        h_BLD: some of the sequence's hidden states, [batch, length, dim].
        valid_BL: positions that count, [batch, length], bool.
        directions_BD: s over the whole sequence, from `direction_sums`, without gradient.
        counts_B: n over the whole sequence.

    Returns:
        Scalar, float32, summed over sequences. Its gradient is that of these positions in the whole mean, as if s
        depended on them. Sequences with fewer than two valid positions have no pair and count as zero.
    """
    unit_BLD = direction(h_BLD.float())[0]
    pairs_B = counts_B * (counts_B - 1)
    per_pair_B1 = torch.where(pairs_B > 0, 1.0 / pairs_B.clamp(min=1), 0.0)[:, None]
    aligned_BL = (unit_BLD * directions_BD[:, None]).sum(-1)
    # d|s|^2/dx_i = 2 s, and s comes without gradient: x_i . s gives the first s. The second summand, x_i . s minus its
    # own value, is zero and gives the other one.
    share_BL = (aligned_BL - 1.0) + (aligned_BL - aligned_BL.detach())
    return (torch.where(valid_BL, share_BL, 0.0) * per_pair_B1).sum()


class CosineRegularizer(Objective):
    """Mean cosine between the hidden states of different tokens of a sequence; a term is a sequence."""

    def module_config(self, dim: int) -> NITPModule.Config:
        """As `Objective.module_config`: no parameters."""
        return NITPModule.Config(projector=IdentityProjector.Config())

    def num_terms(self, positions_BL: Tensor, labels_BL: Tensor) -> Tensor:
        """As `Objective.num_terms`: sequences that have a pair of trained tokens."""
        return ((labels_BL != IGNORE_INDEX).sum(1) >= 2).sum()

    @torch.no_grad()
    def microbatch(self, batch: Microbatch) -> "CosineRegularizerTerms":
        """As `Objective.microbatch`: sums the directions of whole sequences."""
        trained_BL = local(batch.labels_BL) != IGNORE_INDEX
        states_BLD = local(batch.h_BLD).detach()
        chunks = zip(*(x.chunk(batch.num_chunks, dim=1) for x in (states_BLD, trained_BL)))
        directions_BD, counts_B = (sum(parts) for parts in zip(*(direction_sums(h, valid) for h, valid in chunks)))
        group = context_parallel_group(batch.h_BLD)
        if group is not None:
            directions_BD, counts_B = (funcol.all_reduce(x, "sum", group) for x in (directions_BD, counts_B))
        return CosineRegularizerTerms(batch.projector, directions_BD, counts_B)


class CosineRegularizerTerms(MicrobatchTerms):
    """As `MicrobatchTerms`, with the sums over whole sequences."""

    def __init__(self, projector: nn.Module, directions_BD: Tensor, counts_B: Tensor):
        self.projector, self.directions_BD, self.counts_B = projector, directions_BD, counts_B

    def sum(self, h_BLD: Tensor, labels_BL: Tensor, chunk: slice) -> Tensor:
        """As `MicrobatchTerms.sum`."""
        valid_BL = labels_BL != IGNORE_INDEX
        return cosine_regularizer_sum(local(self.projector(h_BLD)), valid_BL, self.directions_BD, self.counts_B)
