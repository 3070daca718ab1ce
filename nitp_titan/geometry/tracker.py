"""Measures the geometry of hidden states during training and validation, over all ranks.

The model and the loss show the meter their states; it sums what `geometry` needs and reduces the sums once.

Suffixes: B batch, L (local) length, D model dim, P pairs.
"""

from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from nitp_titan.config.sections import GeometryConfig, NITPConfig
from nitp_titan.geometry.statistics import describe, Moments
from nitp_titan.objectives.maths import trained_positions
from nitp_titan.objectives.nitp import local

# Names of the measured states; `layer_0` is the embedding.
HIDDEN, TARGET, PROJECTED = "hidden", "target", "projected"


def layer_state(number: int) -> str:
    """Name of the output of a layer, 1 to the number of layers; 0 is the token embedding."""
    return f"layer_{number}"


def measured_states(geometry: GeometryConfig, nitp: NITPConfig, num_layers: int) -> list[str]:
    """States that a run measures, the same on every rank."""
    states = [HIDDEN]
    if nitp.enabled and nitp.objective == "nitp":
        states += [TARGET, PROJECTED]
    return states + ([layer_state(number) for number in range(num_layers + 1)] if geometry.layers else [])


@dataclass
class _Microbatch:
    """What the states of a micro-batch are recognised and weighed by."""

    labels: Tensor
    positions: Tensor
    labelled_BL: Tensor
    trained_BL: Tensor


class GeometryMeter:
    """Collects states of the micro-batches between `measure` and `finish`; otherwise it costs a comparison.

    Every token counts once: ranks of tensor parallelism that hold the same tokens leave them to the first.

    Args:
        settings: the `[geometry]` table.
        nitp: the `[nitp]` table.
        states: names of all states, from `measured_states`.
        dim: model dimension.
        seq_len: length of whole sequences.
        batch_size: sequences of one micro-batch.
        last_step: of training.
    """

    def __init__(
        self,
        settings: GeometryConfig,
        nitp: NITPConfig,
        *,
        states: list[str],
        dim: int,
        seq_len: int,
        batch_size: int,
        last_step: int,
        parallel_dims: ParallelDims,
        parallelism: ParallelismConfig,
        device: torch.device,
    ):
        self.settings, self.temporal_shift, self.states = settings, nitp.temporal_shift, states
        self.last_step = last_step
        self.dim, self.seq_len, self.batch_size, self.device = dim, seq_len, batch_size, device
        axes = ("batch", "cp", "tp")
        meshes = {axis: parallel_dims.get_optional_mesh(axis) for axis in axes}
        self.sizes = {axis: mesh.size() if mesh is not None else 1 for axis, mesh in meshes.items()}
        self.ranks = {axis: mesh.get_local_rank() if mesh is not None else 0 for axis, mesh in meshes.items()}
        self.load_balancer = parallelism.context_parallel_load_balancer
        self.layers_sharded = self.sizes["tp"] > 1 and parallelism.enable_sequence_parallel
        self.active = False

    def due(self, step: int) -> bool:
        """Whether a training step is measured: the first, every interval and the last."""
        return step in (1, self.last_step) or step % self.settings.interval == 0

    def measure(self, num_microbatches: int, *, seed: int) -> None:
        """Measure the next micro-batches.

        Args:
            num_microbatches: how many; later ones are passed over.
            seed: of the sampled pairs.
        """
        self.active = True
        self.num_microbatches = num_microbatches
        self.microbatches: list[_Microbatch] = []
        self.moments: dict[str, Moments] = {}
        self.pair_states: dict[str, Tensor] = {}
        self.pairs = sample_pairs(
            self.settings.num_pairs, num_microbatches * self.batch_size * self.sizes["batch"], self.seq_len, seed
        )

    def expect(self, positions_BL: Tensor, labels_BL: Tensor, *, passed: tuple[Tensor, Tensor]) -> None:
        """Announce a micro-batch whose states will be seen.

        Args:
            positions_BL, labels_BL: of whole sequences.
            passed: the very position ids and labels that model and loss are called with. They tell a micro-batch
                from the pass over made-up ones with which a pipeline schedule finds out shapes.
        """
        if self.active and len(self.microbatches) < self.num_microbatches:
            trained_BL = trained_positions(
                positions_BL, labels_BL, temporal_shift=self.temporal_shift, ignore_index=IGNORE_INDEX
            )
            positions, labels = passed
            self.microbatches.append(_Microbatch(labels, positions, labels_BL != IGNORE_INDEX, trained_BL))

    @torch.no_grad()
    def see(self, state: str, x_BLD: Tensor, passed: Tensor, *, start: int = 0) -> None:
        """Take in states of a micro-batch.

        Args:
            state: one of the names of ``states``.
            x_BLD: this rank's states, [batch, some of its length, dim].
            passed: the position ids or the labels that came with them.
            start: first local position of a piece of the sequence.
        """
        index = self._index(passed)
        sharded = self.layers_sharded and state not in (HIDDEN, TARGET, PROJECTED)
        if index is None or (self.ranks["tp"] and not sharded):
            return
        with spmd.no_typecheck():
            x_BLD = local(x_BLD.detach())
            tokens = self._local_tokens(sharded)[start : start + x_BLD.shape[1]]
            microbatch = self.microbatches[index]
            valid_BL = microbatch.trained_BL if state in (TARGET, PROJECTED) else microbatch.labelled_BL
            valid_BL = valid_BL[:, tokens.to(valid_BL.device)].to(x_BLD.device)
            if state not in self.moments:
                self.moments[state] = Moments.zeros(self.dim, self.device)
                self.pair_states[state] = self._no_pairs()
            self.moments[state].add(x_BLD.flatten(0, 1), valid_BL.flatten())
            self._take_pairs(state, index, tokens, x_BLD, valid_BL)

    def measures(self, passed: Tensor) -> bool:
        """Whether states are taken in that come with these position ids or labels."""
        return self._index(passed) is not None

    def _index(self, passed: Tensor) -> int | None:
        microbatches = self.microbatches if self.active else []
        return next((i for i, m in enumerate(microbatches) if passed is m.labels or passed is m.positions), None)

    def see_layer(self, number: int, x_BLD: Tensor, passed: Tensor) -> None:
        """As `see`, for a layer's output; nothing unless layers are measured."""
        if self.settings.layers:
            self.see(layer_state(number), x_BLD, passed)

    def see_target(self, x_BLD: Tensor, passed: Tensor) -> None:
        """As `see`, for the implicit targets, aligned with the positions that predict them."""
        self.see(TARGET, x_BLD, passed)

    def _local_tokens(self, sharded_over_tp: bool) -> Tensor:
        """Position in the whole sequence of each of this rank's tokens, on the host."""
        tokens = torch.arange(self.seq_len)
        if (cp := self.sizes["cp"]) > 1:
            rank = self.ranks["cp"]
            if self.load_balancer == "headtail":
                runs = tokens.chunk(2 * cp)
                tokens = torch.cat([runs[rank], runs[2 * cp - 1 - rank]])
            else:
                tokens = tokens.chunk(cp)[rank]
        return tokens.chunk(self.sizes["tp"])[self.ranks["tp"]] if sharded_over_tp else tokens

    def _no_pairs(self) -> Tensor:
        """States of the tokens of all pairs, and in the last column whether they count; zero until they are seen."""
        return torch.zeros(2 * self.settings.num_pairs, self.dim + 1, device=self.device)

    def _take_pairs(self, state: str, index: int, tokens: Tensor, x_BLD: Tensor, valid_BL: Tensor) -> None:
        # Sequences are numbered over ranks first, as the loaders of the ranks take turns.
        rows = (index * self.batch_size + torch.arange(len(x_BLD))) * self.sizes["batch"] + self.ranks["batch"]
        sequences, positions = self.pairs
        in_row = sequences[:, None] == rows
        in_piece = positions[:, None] == tokens
        slots = (in_row.any(1) & in_piece.any(1)).nonzero().flatten()
        b, at = (x.int().argmax(1).to(x_BLD.device) for x in (in_row[slots], in_piece[slots]))
        values = torch.cat([x_BLD[b, at].float(), valid_BL[b, at, None].float()], dim=1)
        self.pair_states[state].index_copy_(0, slots.to(self.device), values.to(self.device))

    def finish(self, metrics_rank: int) -> dict[str, dict[str, Any]]:
        """Reduce the sums; a collective of all ranks.

        Returns:
            Figures of `geometry.describe` by state on ``metrics_rank``, nothing elsewhere. States without
            a valid token or that are not finite are left out with a warning.
        """
        self.active = False
        figures = {}
        for state in self.states:
            moments = self.moments.pop(state, None) or Moments.zeros(self.dim, self.device)
            pairs = self.pair_states.pop(state, None)
            pairs = self._no_pairs() if pairs is None else pairs
            if dist.get_world_size() > 1:
                for sums in (*moments.tensors(), pairs):
                    dist.reduce(sums, metrics_rank)
            if dist.get_rank() == metrics_rank:
                figures[state] = self._described(state, moments, pairs)
        self.microbatches = []
        return {state: found for state, found in figures.items() if found is not None}

    def _described(self, state: str, moments: Moments, pairs: Tensor) -> dict[str, Any] | None:
        first, second = pairs.chunk(2)
        valid = (first[:, -1] > 0) & (second[:, -1] > 0)
        figures, reason = None, "not finite"
        try:
            figures = describe(moments, (first[:, :-1], second[:, :-1], valid))
        except torch.linalg.LinAlgError as error:
            reason = str(error)
        if figures is not None and figures["tokens"] == 0:
            figures, reason = None, "no valid token was seen"
        if figures is None:
            logger.warning(f"geometry of {state}: {reason}; left out.")
        return figures


def sample_pairs(num_pairs: int, num_sequences: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random pairs of tokens of different sequences (App. D); of one sequence if there is no other.

    Returns:
        Number of the sequence and position in it, both [2 pairs], int64: first tokens, then second tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> Tensor:
        return torch.randint(high, (num_pairs,), generator=generator)

    def two_different(high: int) -> tuple[Tensor, Tensor]:
        first = draw(high)
        return first, (first + 1 + draw(high - 1)) % high

    if num_sequences > 1:
        sequences, positions = two_different(num_sequences), (draw(seq_len), draw(seq_len))
    else:
        sequences, positions = (draw(1), draw(1)), two_different(seq_len)
    return torch.cat(sequences), torch.cat(positions)
