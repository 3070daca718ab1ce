"""The mathematics of NITP: shift, validity and losses. Pure functions; imports torch only.

Suffixes: B batch, L length, D model dim; ``NITP`` equations are those of arXiv 2605.24956.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def has_next_token(positions_BL: Tensor, following_position_B: Tensor | None = None) -> Tensor:
    """Whether the next token continues a position's document: its position id is one more (Fig. 2).

    Args:
        positions_BL: position ids that restart at 0 with every document, [batch, length].
        following_position_B: position id right after the last one, where another rank holds it.

    Returns:
        [batch, length], bool.
    """
    if following_position_B is None:
        # 0 is nobody's position plus one: every document starts at 0.
        following_position_B = torch.zeros_like(positions_BL[:, 0])
    return torch.cat([positions_BL[:, 1:], following_position_B[:, None]], dim=1) == positions_BL + 1


def next_implicit_tokens(z_BLD: Tensor, following_BRD: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    """The implicit tokens that some positions must predict: the states one position ahead (Eq. 2).

    Args:
        z_BLD: shallow states of one or more runs of consecutive tokens, all as long, [batch, length, dim].
        following_BRD: state right after the end of each run, [batch, runs, dim]; without any run nothing is shifted,
            and every position gets its own state (Table 7).
        start, end: the positions, by default all.

    Returns:
        [batch, end - start, dim]. Where `has_next_token` is false they mean nothing.
    """
    length, num_runs = z_BLD.shape[1], following_BRD.shape[1]
    end = length if end is None else end
    if num_runs == 0:
        return z_BLD[:, start:end]
    pieces = []
    for run in range(num_runs):
        run_end = length * (run + 1) // num_runs
        first, last = max(start, length * run // num_runs), min(end, run_end)
        if first < last:
            pieces.append(z_BLD[:, first + 1 : min(last + 1, run_end)])
            if last == run_end:
                pieces.append(following_BRD[:, run : run + 1])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _direction(x: Tensor) -> tuple[Tensor, Tensor]:
    """Direction of ``x`` and one over its length; a zero vector has none and gets zero twice, with zero gradient.

    Squares of float32 overflow above 1e19 and vanish below 1e-19, so rows far from 1 are scaled by a power of two
    first, which rounds nothing and leaves all others as they are, bit for bit. A vector below the smallest normal
    number (1.2e-38) counts as zero: its gradient, one over its norm, would overflow.
    """
    size = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    scale = torch.where(size > 2.0**60, 2.0**-80, torch.where(size < 2.0**-40, 2.0**80, 1.0))
    scaled = x * scale
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    norm = torch.where(norm > 2.0 ** (80 - 126), norm, float("inf"))
    return scaled / norm, scale / norm


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cos(prediction, target) over the last dimension (Eq. 3); 1 for a zero vector."""
    return 1.0 - (_direction(prediction)[0] * _direction(target)[0]).sum(-1)


class _CosineLossSum(torch.autograd.Function):
    """Sum of `cosine_loss` over valid positions, in float32, with its gradient in closed form.

    It keeps prediction and target as they came, and one number per position. Plain autograd of `cosine_loss` keeps
    float32 copies of both, makes more on its way back, and takes 2.8 times as long on a CPU.
    """

    @staticmethod
    def forward(ctx, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        cosine = (_direction(prediction.float())[0] * _direction(target.float())[0]).sum(-1)
        ctx.save_for_backward(prediction, target, valid, cosine)
        return torch.where(valid, 1.0 - cosine, 0.0).sum()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        *vectors, valid, cosine = ctx.saved_tensors
        directions, inverse_lengths = zip(*(_direction(x.float()) for x in vectors))
        slope = torch.where(valid, gradient, 0.0)[..., None]
        gradients: list[Tensor | None] = [None, None]
        for own, other in ((0, 1), (1, 0)):
            if ctx.needs_input_grad[own]:
                # d(1 - u.v)/dx = ((u.v) u - v) / |x|
                along = cosine[..., None] * directions[own] - directions[other]
                gradients[own] = (along * (slope * inverse_lengths[own])).to(vectors[own].dtype)
        return *gradients, None


def mse_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared difference, averaged over the last dimension (Table 7)."""
    return (prediction - target).square().mean(-1)


def smooth_l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Huber loss with threshold 1, averaged over the last dimension (Table 7)."""
    return F.smooth_l1_loss(prediction, target, reduction="none").mean(-1)


def kl_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """KL(target || prediction), both as softmax distributions over the feature dimension.

    The paper names the loss (Table 7) and not its distributions; the softmax over
    features at temperature 1, with the implicit token as teacher, is our reading.
    """
    log_prediction = F.log_softmax(prediction, dim=-1)
    log_target = F.log_softmax(target, dim=-1)
    return (log_target.exp() * (log_target - log_prediction)).sum(-1)


LOSSES = {
    "cosine": cosine_loss,
    "mse": mse_loss,
    "smooth_l1": smooth_l1_loss,
    "kl": kl_loss,
}


def nitp_loss_sum(
    prediction_BLD: Tensor,
    target_BLD: Tensor,
    valid_BL: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = cosine_loss,
) -> Tensor:
    """Sum of the NITP loss over valid positions, in float32 whatever the input type.

    Args:
        prediction_BLD: projected hidden states ``P(h_t)``, [batch, length, dim].
        target_BLD: implicit tokens aligned by `next_implicit_tokens`, same shape.
        valid_BL: positions that count, [batch, length], bool.
        loss: a value of `LOSSES`, or any function of prediction and target that reduces the last dimension.

    Returns:
        Scalar, float32. The caller divides by the number of valid positions.
    """
    if loss is cosine_loss:
        return _CosineLossSum.apply(prediction_BLD, target_BLD, valid_BL)
    loss_BL = loss(prediction_BLD.float(), target_BLD.float())
    return torch.where(valid_BL, loss_BL, 0.0).sum()


def direction_sums(h_BLD: Tensor, valid_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the directions of a sequence's valid hidden states, and their number.

    Returns:
        [batch, dim] float32 and [batch] float32. Both add up over chunks and ranks.
    """
    unit_BLD = _direction(h_BLD.float())[0] * valid_BL[..., None]
    return unit_BLD.sum(1), valid_BL.sum(1, dtype=torch.float32)


def cosine_regularizer_sum(h_BLD: Tensor, valid_BL: Tensor, directions_BD: Tensor, counts_B: Tensor) -> Tensor:
    """Share of some positions in the mean cosine between different tokens of a sequence.

    The generic regulariser of the paper's ablation (Table 3, after Gao et al. 2019). Over
    n unit vectors x_i with sum s the mean over ordered pairs is (|s|^2 - n) / (n (n - 1)),
    so position i contributes (x_i . s - 1) / (n (n - 1)) to the value, while its gradient
    is 2 s / (n (n - 1)): every pair contains it twice. That needs s, but no second state.

    Args:
        h_BLD: some of the sequence's hidden states, [batch, length, dim].
        valid_BL: positions that count, [batch, length], bool.
        directions_BD: s over the whole sequence, from `direction_sums`, without gradient.
        counts_B: n over the whole sequence.

    Returns:
        Scalar, float32, summed over sequences. Its gradient is that of these positions in the whole mean, as if s
        depended on them. Sequences with fewer than two valid positions have no pair and count as zero.
    """
    unit_BLD = _direction(h_BLD.float())[0]
    pairs_B = counts_B * (counts_B - 1)
    per_pair_B1 = torch.where(pairs_B > 0, 1.0 / pairs_B.clamp(min=1), 0.0)[:, None]
    aligned_BL = (unit_BLD * directions_BD[:, None]).sum(-1)
    # The second summand is zero and has the other half of the gradient.
    share_BL = (aligned_BL - 1.0) + (aligned_BL - aligned_BL.detach())
    return (torch.where(valid_BL, share_BL, 0.0) * per_pair_B1).sum()


def trained_positions(positions_BL: Tensor, labels_BL: Tensor, *, temporal_shift: int, ignore_index: int) -> Tensor:
    """Validity of whole sequences: the next token continues the document and the label counts.

    Returns:
        [batch, length], bool. What the loss computes shard by shard, for counting.
    """
    labelled_BL = labels_BL != ignore_index
    if temporal_shift == 0:
        return labelled_BL
    continues_BL = torch.zeros_like(labelled_BL)
    continues_BL[:, :-1] = positions_BL[:, 1:] == positions_BL[:, :-1] + 1
    return labelled_BL & continues_BL
