"""Measures the geometry of hidden states during training and validation, over all ranks.

The model and the loss show the tracker their states. It sums what `statistics` needs and reduces the sums once.

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

from nitp_titan.geometry.settings import GeometryConfig
from nitp_titan.geometry.statistics import describe, Moments, sample_pairs
from nitp_titan.objectives.alignment import chunk_order, valid_positions
from nitp_titan.objectives.objective import local
from nitp_titan.objectives.registry import build_objective
from nitp_titan.objectives.settings import NITPConfig
from nitp_titan.objectives.sites import HIDDEN, layer_site, PROJECTED, TARGET


def measured_sites(geometry: GeometryConfig, nitp: NITPConfig, num_layers: int) -> list[str]:
    """Sites that a run measures, the same on every rank."""
    sites = [HIDDEN, *(build_objective(nitp).sites if nitp.enabled else ())]
    return sites + ([layer_site(number) for number in range(num_layers + 1)] if geometry.layers else [])


@dataclass
class _Microbatch:
    """Tensors that recognise the states of a micro-batch, and masks that weigh them."""

    labels: Tensor
    positions: Tensor
    labelled_BL: Tensor
    valid_BL: Tensor


class GeometryTracker:
    """Collects states of the micro-batches between `start` and `reduce`; otherwise it costs a comparison.

    Every token counts once: ranks of tensor parallelism that hold the same tokens leave them to the first.

    Args:
        settings: the `[geometry]` table.
        nitp: the `[nitp]` table.
        sites: from `measured_sites`.
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
        sites: list[str],
        dim: int,
        seq_len: int,
        batch_size: int,
        last_step: int,
        parallel_dims: ParallelDims,
        parallelism: ParallelismConfig,
        device: torch.device,
    ):
        self.settings, self.temporal_shift, self.sites = settings, nitp.temporal_shift, sites
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

    def start(self, num_microbatches: int, *, seed: int) -> None:
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
        num_sequences = num_microbatches * self.batch_size * self.sizes["batch"]
        self.pairs = sample_pairs(torch.full((num_sequences,), self.seq_len), self.settings.num_pairs, seed)

    def start_microbatch(self, positions_BL: Tensor, labels_BL: Tensor, *, passed: tuple[Tensor, Tensor]) -> None:
        """Announce a micro-batch whose states will be seen.

        Args:
            positions_BL, labels_BL: of whole sequences.
            passed: the very position ids and labels that model and loss are called with. They tell a micro-batch
                from the pass over made-up ones with which a pipeline schedule finds out shapes.
        """
        if self.active and len(self.microbatches) < self.num_microbatches:
            valid_BL = valid_positions(
                positions_BL, labels_BL, temporal_shift=self.temporal_shift, ignore_index=IGNORE_INDEX
            )
            positions, labels = passed
            self.microbatches.append(_Microbatch(labels, positions, labels_BL != IGNORE_INDEX, valid_BL))

    @torch.no_grad()
    def observe(self, site: str, x_BLD: Tensor, passed: Tensor, *, start: int = 0) -> None:
        """As `Observer.observe`; sites that the run does not measure are passed over."""
        index = self._index(passed)
        sharded = self.layers_sharded and site not in (HIDDEN, TARGET, PROJECTED)
        if index is None or site not in self.sites or (self.ranks["tp"] and not sharded):
            return
        with spmd.no_typecheck():
            x_BLD = local(x_BLD.detach())
            tokens = self._local_tokens(sharded)[start : start + x_BLD.shape[1]]
            microbatch = self.microbatches[index]
            valid_BL = microbatch.valid_BL if site in (TARGET, PROJECTED) else microbatch.labelled_BL
            valid_BL = valid_BL[:, tokens.to(valid_BL.device)].to(x_BLD.device)
            if site not in self.moments:
                self.moments[site] = Moments.zeros(self.dim, self.device)
                self.pair_states[site] = self._no_pairs()
            self.moments[site].add(x_BLD.flatten(0, 1), valid_BL.flatten())
            self._take_pairs(site, index, tokens, x_BLD, valid_BL)

    def observes(self, passed: Tensor) -> bool:
        """As `Observer.observes`."""
        return self._index(passed) is not None

    def _index(self, passed: Tensor) -> int | None:
        microbatches = self.microbatches if self.active else []
        return next((i for i, m in enumerate(microbatches) if passed is m.labels or passed is m.positions), None)

    def _local_tokens(self, sharded_over_tp: bool) -> Tensor:
        """Position in the whole sequence of each of this rank's tokens, on the host."""
        tokens = torch.arange(self.seq_len)
        if (cp := self.sizes["cp"]) > 1:
            chunks_per_rank = 2 if self.load_balancer == "headtail" else 1
            chunks = tokens.chunk(cp * chunks_per_rank)
            tokens = torch.cat([chunks[number] for number in chunk_order(cp, chunks_per_rank)[self.ranks["cp"]]])
        return tokens.chunk(self.sizes["tp"])[self.ranks["tp"]] if sharded_over_tp else tokens

    def _no_pairs(self) -> Tensor:
        """States of the tokens of all pairs, and in the last column whether they count; zero until they are seen."""
        return torch.zeros(2 * self.settings.num_pairs, self.dim + 1, device=self.device)

    def _take_pairs(self, site: str, index: int, tokens: Tensor, x_BLD: Tensor, valid_BL: Tensor) -> None:
        # Sequences are numbered over ranks first, as the loaders of the ranks take turns.
        rows = (index * self.batch_size + torch.arange(len(x_BLD))) * self.sizes["batch"] + self.ranks["batch"]
        sequences, positions = self.pairs
        in_row = sequences[:, None] == rows
        in_piece = positions[:, None] == tokens
        slots = (in_row.any(1) & in_piece.any(1)).nonzero().flatten()
        b, at = (x.int().argmax(1).to(x_BLD.device) for x in (in_row[slots], in_piece[slots]))
        values = torch.cat([x_BLD[b, at].float(), valid_BL[b, at, None].float()], dim=1)
        self.pair_states[site].index_copy_(0, slots.to(self.device), values.to(self.device))

    def reduce(self, metrics_rank: int) -> dict[str, dict[str, Any]]:
        """Reduce the sums over all ranks of the default group; a collective.

        Returns:
            `describe` of each site on ``metrics_rank``, nothing elsewhere. Sites without a valid token, or whose
            states are not finite, are left out with a warning.
        """
        self.active = False
        stats = {}
        for site in self.sites:
            moments = self.moments.pop(site, None) or Moments.zeros(self.dim, self.device)
            pairs = self.pair_states.pop(site, None)
            pairs = self._no_pairs() if pairs is None else pairs
            if dist.get_world_size() > 1:
                for sums in (*moments.tensors(), pairs):
                    dist.reduce(sums, metrics_rank)
            if dist.get_rank() == metrics_rank:
                stats[site] = self._described(site, moments, pairs)
        self.microbatches = []
        return {site: found for site, found in stats.items() if found is not None}

    def _described(self, site: str, moments: Moments, pairs: Tensor) -> dict[str, Any] | None:
        first, second = pairs.chunk(2)
        valid = (first[:, -1] > 0) & (second[:, -1] > 0)
        stats, reason = None, "not finite"
        try:
            stats = describe(moments, (first[:, :-1], second[:, :-1], valid))
        except torch.linalg.LinAlgError as error:
            reason = str(error)
        if stats is not None and stats["tokens"] == 0:
            stats, reason = None, "no valid token was seen"
        if stats is None:
            logger.warning(f"geometry of {site}: {reason}; left out.")
        return stats
