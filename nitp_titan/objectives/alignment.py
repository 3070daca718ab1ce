"""Which implicit token a position must predict, and whether it has one (Eq. 2, Fig. 2).

Pure functions; imports torch only.

Suffixes: B batch, L length, D model dim, K chunks of consecutive tokens that a rank holds.
"""

import torch
from torch import Tensor


def has_next_token(positions_BL: Tensor, next_position_B: Tensor | None = None) -> Tensor:
    """Whether the next token continues a position's document: its position id is one more (Fig. 2).

    Args:
        positions_BL: position ids that restart at 0 with every document, [batch, length].
        next_position_B: position id right after the last one, where another rank holds it.

    Returns:
        [batch, length], bool.
    """
    if next_position_B is None:
        # 0 is nobody's position plus one: every document starts at 0.
        next_position_B = torch.zeros_like(positions_BL[:, 0])
    return torch.cat([positions_BL[:, 1:], next_position_B[:, None]], dim=1) == positions_BL + 1


def next_implicit_tokens(z_BLD: Tensor, halo_BKD: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    """The implicit tokens that some positions must predict: the states one position ahead (Eq. 2).

    Args:
        z_BLD: shallow states of one or more chunks of consecutive tokens, all as long, [batch, length, dim].
        halo_BKD: state right after the end of each chunk, [batch, chunks, dim]; without any chunk nothing is shifted,
            and every position gets its own state (Table 7).
        start, end: the positions, by default all.

    Returns:
        [batch, end - start, dim]. Where `has_next_token` is false they mean nothing.
    """
    length, num_chunks = z_BLD.shape[1], halo_BKD.shape[1]
    end = length if end is None else end
    if num_chunks == 0:
        return z_BLD[:, start:end]
    pieces = []
    for number in range(num_chunks):
        chunk_end = length * (number + 1) // num_chunks
        first, last = max(start, length * number // num_chunks), min(end, chunk_end)
        if first < last:
            pieces.append(z_BLD[:, first + 1 : min(last + 1, chunk_end)])
            if last == chunk_end:
                pieces.append(halo_BKD[:, number : number + 1])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def valid_positions(positions_BL: Tensor, labels_BL: Tensor, *, temporal_shift: int, ignore_index: int) -> Tensor:
    """Validity of whole sequences: the next token continues the document and the label counts.

    Returns:
        [batch, length], bool. What the loss computes shard by shard, for counting.
    """
    labelled_BL = labels_BL != ignore_index
    if temporal_shift == 0:
        return labelled_BL
    return labelled_BL & has_next_token(positions_BL)


def chunk_order(num_ranks: int, chunks_per_rank: int) -> list[list[int]]:
    """Which chunks of a sequence each rank of context parallelism holds.

    Args:
        num_ranks: context-parallel degree.
        chunks_per_rank: 1, or 2 with TorchTitan's head-tail load balancer.

    Returns:
        By rank, the numbers of its chunks in their local order: rank, or rank and 2 num_ranks - 1 - rank.
    """
    if chunks_per_rank == 1:
        return [[rank] for rank in range(num_ranks)]
    return [[rank, 2 * num_ranks - 1 - rank] for rank in range(num_ranks)]
