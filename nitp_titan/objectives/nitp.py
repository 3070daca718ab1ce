"""NITP: the projected hidden state at t points towards the shallow state of token t + 1.

Suffixes: B batch, L (local) length, D model dim, K chunks of consecutive tokens that a rank holds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module

import spmd_types as spmd
import torch
import torch.distributed._functional_collectives as funcol
import torch.nn as nn
from torch import Tensor
from torch.distributed import ProcessGroup
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import ParallelismConfig
from torchtitan.models.common import Linear
from torchtitan.models.common.decoder_sharding import (
    dense_activation_placement,
    dense_sequence_parallel_placement,
    set_dense_ffn_sharding,
)
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from nitp_titan.errors import UserError
from nitp_titan.objectives.alignment import chunk_order, has_next_token, next_implicit_tokens, valid_positions
from nitp_titan.objectives.distances import DISTANCES, nitp_loss_sum
from nitp_titan.objectives.objective import (
    context_parallel_group,
    local,
    Microbatch,
    MicrobatchTerms,
    Objective,
)
from nitp_titan.objectives.settings import NITPConfig
from nitp_titan.objectives.sites import PROJECTED, TARGET


class NITP(Objective):
    """The paper's objective; a term is a valid position.

    Args:
        settings: the `[nitp]` table.
    """

    sites = (TARGET, PROJECTED)

    def __init__(self, settings: NITPConfig):
        super().__init__(settings)
        self.distance = find_distance(settings.loss)
        self.loss_sum: Callable[..., Tensor] = nitp_loss_sum

    def module_config(self, dim: int) -> "NITPModule.Config":
        """As `Objective.module_config`: a SwiGLU projector of 12 dim^2 parameters at its default width (App. G.2)."""
        projector: FeedForward.Config | IdentityProjector.Config = IdentityProjector.Config()
        if self.settings.projector == "swiglu":
            hidden = round(self.settings.projector_width * dim)
            # The paper gives no initialisation; TorchTitan's for the family's own linears.
            init = {"weight": partial(nn.init.trunc_normal_, std=0.02)}
            up, gate = (Linear.Config(in_features=dim, out_features=hidden, param_init=init) for _ in range(2))
            down = Linear.Config(in_features=hidden, out_features=dim, param_init=init)
            projector = FeedForward.Config(w1=gate, w2=down, w3=up)
        target = ImplicitTarget.Config(temporal_shift=self.settings.temporal_shift)
        return NITPModule.Config(
            projector=projector,
            target=target,
            target_layer=self.settings.target_layer,
            stop_gradient=self.settings.stop_gradient,
        )

    def num_terms(self, positions_BL: Tensor, labels_BL: Tensor) -> Tensor:
        """As `Objective.num_terms`: valid positions."""
        return valid_positions(
            positions_BL, labels_BL, temporal_shift=self.settings.temporal_shift, ignore_index=IGNORE_INDEX
        ).sum()

    def compile(self, backend: str) -> None:
        """As `Objective.compile`: the sum over a chunk."""
        self.loss_sum = torch.compile(self.loss_sum, backend=backend)

    def microbatch(self, batch: Microbatch) -> "NITPTerms":
        """As `Objective.microbatch`; ``captured`` is what `ImplicitTarget.forward` returns."""
        return NITPTerms(self, batch)


class NITPTerms(MicrobatchTerms):
    """As `MicrobatchTerms`: prediction and implicit token meet here."""

    def __init__(self, objective: NITP, batch: Microbatch):
        self.objective, self.batch = objective, batch
        self.captured_BLD, self.halo_BKD, self.valid_BL = batch.captured
        learns = self.captured_BLD.requires_grad
        self.z_BLD = self.captured_BLD.detach().requires_grad_() if learns else self.captured_BLD

    def sum(self, h_BLD: Tensor, labels_BL: Tensor, chunk: slice) -> Tensor:
        """As `MicrobatchTerms.sum`."""
        prediction_BLD = local(self.batch.projector(h_BLD))
        if self.batch.observer is not None:
            self.batch.observer.observe(PROJECTED, prediction_BLD, self.batch.labels_BL, start=chunk.start)
        target_BLD = next_implicit_tokens(self.z_BLD, self.halo_BKD, chunk.start, chunk.stop)
        valid_BL = self.valid_BL[:, chunk] & (labels_BL != IGNORE_INDEX)
        return self.objective.loss_sum(prediction_BLD, target_BLD, valid_BL, self.objective.distance)

    def captured_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As `MicrobatchTerms.captured_gradients`: the shallow states, without stop-gradient."""
        if self.z_BLD.grad is not None:
            yield self.captured_BLD, self.z_BLD.grad


class NITPModule(Module):
    """The objective's part of a decoder: projector and target. Dropped at inference (App. H)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        projector: "FeedForward.Config | IdentityProjector.Config"
        target: "ImplicitTarget.Config | None" = None
        target_layer: int | None = None
        """Layer of the implicit token, 0 for the embedding; None captures nothing."""

        stop_gradient: bool = True

    def __init__(self, config: Config):
        super().__init__()
        self.projector = config.projector.build()
        self.target = config.target.build() if config.target is not None else None


class IdentityProjector(Module):
    """Takes the hidden state as it is (the paper's projector ablation, Table 8)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x as it is."""
        return x


class ImplicitTarget(Module):
    """Shallow states to what `next_implicit_tokens` takes, and validity. Has no parameters.

    Tensor parallelism: the sharding config gathers the sequence. Context parallelism: the first state of every chunk
    of consecutive tokens travels to the rank of the chunk before it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        temporal_shift: int = 1
        cp_load_balancer: str | None = None

    def __init__(self, config: Config):
        super().__init__()
        self.temporal_shift = config.temporal_shift
        self.cp_load_balancer = config.cp_load_balancer

    def forward(self, z_BLD: Tensor, positions_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states are not shifted here, which would copy them.

        Returns:
            z_BLD; halo_BKD, the state after each local chunk (K is 1 or 2, 0 without shift); valid_BL, bool.
        """
        with spmd.no_typecheck():
            group = context_parallel_group(z_BLD)
            z_BLD, positions_BL = local(z_BLD), local(positions_BL)
            if self.temporal_shift == 0:
                return z_BLD, z_BLD[:, :0], torch.ones_like(positions_BL, dtype=torch.bool)
            num_chunks = 2 if group is not None and self.cp_load_balancer == "headtail" else 1
            z_chunks, position_chunks = (x.chunk(num_chunks, dim=1) for x in (z_BLD, positions_BL))
            halo = _halo(z_chunks, position_chunks, group)
            valids = [has_next_token(ids, next_id) for ids, (_, next_id) in zip(position_chunks, halo)]
            return z_BLD, torch.stack([state for state, _ in halo], dim=1), torch.cat(valids, dim=1)


def _halo(
    z_chunks: Sequence[Tensor], position_chunks: Sequence[Tensor], group: ProcessGroup | None
) -> list[tuple[Tensor, Tensor | None]]:
    """State and position id right after each local chunk; zeros and None at the end of the sequence."""
    end = torch.zeros_like(z_chunks[0][:, 0]), None
    if group is None:
        return [end] * len(z_chunks)
    first_states, first_ids = (
        funcol.all_gather_tensor(torch.stack([chunk[:, 0] for chunk in chunks]), 0, group)
        for chunks in (z_chunks, position_chunks)
    )
    order = chunk_order(group.size(), len(z_chunks))
    gathered = {number: index for index, number in enumerate(number for of_rank in order for number in of_rank)}
    following = [gathered.get(number + 1) for number in order[group.rank()]]
    return [end if index is None else (first_states[index], first_ids[index]) for index in following]


def set_nitp_sharding(config: NITPModule.Config, parallelism: ParallelismConfig) -> None:
    """Fill the sharding configs of the NITP module, as each family does for its own modules."""
    sequence_parallel = parallelism.enable_sequence_parallel
    # Every tensor-parallel rank computes the same loss, so gradients of its inputs are
    # whole on every rank (I), while those of the replicated hidden state are partial (R).
    invariant = dense_activation_placement(tp=spmd.I)
    replicated = dense_activation_placement(tp=spmd.R)
    if config.target is not None:
        config.target.cp_load_balancer = parallelism.context_parallel_load_balancer
        config.target.sharding_config = ShardingConfig(
            in_src_shardings={"z_BLD": dense_sequence_parallel_placement() if sequence_parallel else invariant},
            in_dst_shardings={"z_BLD": invariant},
        )
    if isinstance(config.projector, FeedForward.Config):
        # The final norm has gathered the sequence: no sequence parallelism from here on.
        set_dense_ffn_sharding(config.projector, attn_x_layout=replicated, enable_sp=False)
    else:
        config.projector.sharding_config = ShardingConfig(
            in_src_shardings={"x": replicated}, in_dst_shardings={"x": invariant}
        )


@cache
def find_distance(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The distance that `[nitp] loss` names: a key of `DISTANCES`, or ``module:function`` of another package.

    Raises:
        UserError: if there is no such module or function, or it is not a distance that can be trained.
    """
    if name in DISTANCES:
        return DISTANCES[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"[nitp] loss = '{name}' cannot be imported: {error}.", table="nitp", key="loss") from None
    if not callable(found):
        raise UserError(f"[nitp] loss = '{name}' is not a function.", table="nitp", key="loss")
    if (reason := _why_not_a_distance(found)) is not None:
        raise UserError(
            f"[nitp] loss = '{name}' {reason}. It takes prediction and target, float32 [batch, length, dim], and "
            "returns one number per position, [batch, length].",
            table="nitp",
            key="loss",
        )
    return found


def _why_not_a_distance(loss: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """Why a function cannot be trained as a distance, or None; tried on the CPU with its gradient."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 2, 3, 8, generator=generator, dtype=torch.float32, device="cpu")
    prediction.requires_grad_()
    try:
        with torch.enable_grad():
            value = loss(prediction, target)
            if not isinstance(value, Tensor):
                return f"returns {type(value).__name__}"
            if value.shape != prediction.shape[:2]:
                return f"returns {list(value.shape)} for [2, 3, 8]"
            (alone,) = torch.autograd.grad(value[0, 0], prediction, retain_graph=True)
            (gradient,) = torch.autograd.grad(value.sum(), prediction)
    except Exception as error:
        # A function of the user's raises anything.
        return f"fails: {type(error).__name__}: {error}".rstrip(". ")
    if not (value.isfinite().all() and gradient.isfinite().all()):
        return "is not finite for random numbers"
    alone[0, 0] = 0
    return "mixes positions, which may be of different documents" if alone.any() else None
