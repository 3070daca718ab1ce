"""The NITP module and the decoder mixin that captures the implicit tokens.

Suffixes: B batch, L (local) length, D model dim.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import spmd_types as spmd
import torch
import torch.distributed._functional_collectives as funcol
import torch.nn as nn
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torchtitan.config import ParallelismConfig
from torchtitan.distributed.spmd_types import current_spmd_mesh
from torchtitan.models.common import Linear
from torchtitan.models.common.decoder_sharding import (
    dense_activation_placement,
    dense_sequence_parallel_placement,
    set_dense_ffn_sharding,
)
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from nitp_titan.config import NITPConfig
from nitp_titan.objective import has_next_token, next_implicit_tokens

if TYPE_CHECKING:
    from nitp_titan.meter import GeometryMeter


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, differentiable; DTensors come from ``spmd_backend = "full_dtensor"`` only."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def context_parallel_group(tensor: Tensor) -> ProcessGroup | None:
    """The ranks that hold the other parts of the sequence; None without context parallelism."""
    mesh = tensor.device_mesh if isinstance(tensor, DTensor) else current_spmd_mesh()
    names = () if mesh is None else mesh.mesh_dim_names or ()
    if "cp" not in names or mesh.size(names.index("cp")) == 1:
        return None
    return mesh.get_group("cp")


class NoProjector(Module):
    """Takes the hidden state as it is (the paper's projector ablation, Table 8)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class ImplicitTarget(Module):
    """Shallow states to (next implicit tokens, validity). Has no parameters.

    Tensor parallelism: the sharding config gathers the sequence. Context parallelism: the
    first state of every contiguous run of tokens travels to the rank of the run before it.
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
        """Returns what `next_implicit_tokens` takes, [batch, length, dim] and [batch, runs, dim], and validity
        [batch, length], bool. The states are not shifted here, which would copy them."""
        with spmd.no_typecheck():
            group = context_parallel_group(z_BLD)
            z_BLD, positions_BL = local(z_BLD), local(positions_BL)
            if self.temporal_shift == 0:
                return z_BLD, z_BLD[:, :0], torch.ones_like(positions_BL, dtype=torch.bool)
            num_runs = 2 if group is not None and self.cp_load_balancer == "headtail" else 1
            runs = list(zip(*(x.chunk(num_runs, dim=1) for x in (z_BLD, positions_BL))))
            states, position_ids = zip(*self._following(runs, group))
            valids = [has_next_token(positions, after) for (_, positions), after in zip(runs, position_ids)]
            return z_BLD, torch.stack(states, dim=1), torch.cat(valids, dim=1)

    def _following(
        self, runs: list[tuple[Tensor, Tensor]], group: ProcessGroup | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The state and position id right after each run; zeros and None at the end of the sequence."""
        num_runs = len(runs)
        nothing = torch.zeros_like(runs[0][0][:, 0]), None
        if group is None:
            return [nothing] * num_runs
        cp, rank = group.size(), group.rank()
        heads_RBD = torch.stack([z[:, 0] for z, _ in runs])
        heads_RB = torch.stack([positions[:, 0] for _, positions in runs])
        all_heads_RBD = funcol.all_gather_tensor(heads_RBD, 0, group)
        all_heads_RB = funcol.all_gather_tensor(heads_RB, 0, group)
        following: list[tuple[Tensor, Tensor | None]] = []
        for run in range(num_runs):
            # TorchTitan's head-tail balancer gives rank r the runs r and 2 cp - 1 - r.
            successor = (rank if run == 0 else 2 * cp - 1 - rank) + 1
            if successor == num_runs * cp:
                following.append(nothing)
                continue
            owner, slot = (successor, 0) if successor < cp else (2 * cp - 1 - successor, 1)
            index = owner * num_runs + slot
            following.append((all_heads_RBD[index], all_heads_RB[index]))
        return following


class NITP(Module):
    """What NITP adds to a decoder: projector and target. Dropped at inference (App. H)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        target_layer: int | None
        """Layer of the implicit token, 0 for the embedding; None captures nothing."""

        stop_gradient: bool = True
        projector: FeedForward.Config | NoProjector.Config
        target: ImplicitTarget.Config

    def __init__(self, config: Config):
        super().__init__()
        self.projector = config.projector.build()
        self.target = config.target.build()


def nitp_module_config(dim: int, settings: NITPConfig) -> NITP.Config:
    """Config of the NITP module for a decoder of model dimension ``dim`` (App. G.2: 12 d^2 parameters).

    Without a target, for the cosine regulariser or weight 0, the module has no parameters.
    """
    no_target = settings.objective == "cosine_regularizer" or not settings.enabled
    projector: FeedForward.Config | NoProjector.Config = NoProjector.Config()
    if settings.projector == "swiglu" and not no_target:
        hidden = round(settings.projector_width * dim)
        # The paper gives no initialisation; TorchTitan's for the family's own linears.
        init = {"weight": partial(nn.init.trunc_normal_, std=0.02)}
        up, gate = (Linear.Config(in_features=dim, out_features=hidden, param_init=init) for _ in range(2))
        down = Linear.Config(in_features=hidden, out_features=dim, param_init=init)
        projector = FeedForward.Config(w1=gate, w2=down, w3=up)
    return NITP.Config(
        target_layer=None if no_target else settings.target_layer,
        stop_gradient=settings.stop_gradient,
        projector=projector,
        target=ImplicitTarget.Config(temporal_shift=settings.temporal_shift),
    )


def set_nitp_sharding(config: NITP.Config, parallelism: ParallelismConfig) -> None:
    """Fill the sharding configs of the NITP module, as each family does for its own modules."""
    sequence_parallel = parallelism.enable_sequence_parallel
    # Every tensor-parallel rank computes the same loss, so gradients of its inputs are
    # whole on every rank (I), while those of the replicated hidden state are partial (R).
    invariant = dense_activation_placement(tp=spmd.I)
    replicated = dense_activation_placement(tp=spmd.R)
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


class NITPDecoder:
    """Mixin for `torchtitan.models.common.decoder.Decoder`: forward with capture of the implicit token.

    Training returns ``(h, z, following, valid)`` to the loss (`ImplicitTarget.forward`); with gradients off it returns
    ``h`` alone, so that validation reports plain cross-entropy. A pipeline stage hands the
    captured state on as its second output.
    """

    meter: "GeometryMeter | None" = None
    """Shown the output of every layer; set by the trainer where layers are measured."""

    def forward(self, tokens, z_BLD=None, positions=None, attention_masks=None):
        # Decoder.forward with the capture; tests/test_upstream.py fails when upstream's changes.
        settings = self.config.nitp
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        if settings.target_layer == 0 and self.tok_embeddings is not None:
            z_BLD = h.detach() if settings.stop_gradient else h
        if self.tok_embeddings is not None:
            self.show_layer(0, h, positions)

        for name, layer in self.layers.items():
            h = layer(h, attention_masks, positions)
            self.show_layer(int(name) + 1, h, positions)
            if int(name) + 1 == settings.target_layer:
                z_BLD = h.detach() if settings.stop_gradient else h

        h = self.norm(h) if self.norm is not None else h

        if self.lm_head is None:
            return h if z_BLD is None else (h, z_BLD)
        if not self._skip_lm_head:
            return self.lm_head(h)
        return self.with_target(h, z_BLD, positions)

    def show_layer(self, number: int, h: Tensor, positions: Tensor) -> None:
        """Show the geometry meter a layer's output, 1 to the number of layers; 0 is the token embedding."""
        if self.meter is not None:
            self.meter.see_layer(number, h, positions)

    def with_target(self, h: Tensor, z_BLD: Tensor | None, positions: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the last stage returns: hidden states alone, or in training with what their targets are made of."""
        training, measuring = torch.is_grad_enabled(), self.meter is not None and self.meter.active
        if z_BLD is None or not (training or measuring):
            return h
        z, following, valid = self.nitp.target(z_BLD, positions)
        if measuring:
            with spmd.no_typecheck():
                target = next_implicit_tokens(z, following)
            self.meter.see_target(target, positions)
        return (h, z, following, valid) if training else h
