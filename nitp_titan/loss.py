"""Cross-entropy plus the NITP loss, chunk by chunk (Eq. 4)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed._functional_collectives as funcol
from torch import nn, Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import ChunkedLossWrapper, IGNORE_INDEX
from torchtitan.config import CompileConfig

from nitp_titan.config import NITPConfig, UserError
from nitp_titan.meter import GeometryMeter, HIDDEN, PROJECTED
from nitp_titan.nitp import context_parallel_group, local
from nitp_titan.objective import (
    cosine_regularizer_sum,
    direction_sums,
    LOSSES,
    next_implicit_tokens,
    nitp_loss_sum,
)


def find_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The distance that `[nitp] loss` names: a key of `LOSSES`, or ``module:function`` of another package.

    Raises:
        UserError: if there is no such module or function.
    """
    if name in LOSSES:
        return LOSSES[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"[nitp] loss = '{name}' cannot be imported: {error}.", table="nitp", key="loss") from None
    if not callable(found):
        raise UserError(f"[nitp] loss = '{name}' is no function.", table="nitp", key="loss")
    return found


class ChunkedLoss(ChunkedLossWrapper):
    """TorchTitan's chunked cross-entropy, right under schedules that split the backward pass too.

    It shows the hidden states to the geometry meter.
    """

    meter: GeometryMeter | None = None
    """Set by the trainer where geometry is measured."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        keep_unsharded: bool = False
        """Leave final norm and unembedding gathered, as they were found.

        ChunkedLossWrapper reshards both, which are one FSDP unit. Zero-bubble schedules then look up the
        module's parameters in the autograd graph, find the shards, and lose the norm's gradient.
        """

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        super().__init__(config, compile_config=compile_config)
        self.keep_unsharded = config.keep_unsharded

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `ChunkedLossWrapper.__call__`."""
        if self.meter is not None:
            self.meter.see(HIDDEN, pred[0] if isinstance(pred, tuple) else pred, labels)
        loss, metrics = self.compute(pred, labels, global_valid_tokens, **loss_inputs)
        # After every backward pass inside the loss: each of them reshards all that it finds gathered.
        if self.keep_unsharded and loss.requires_grad and isinstance(self.lm_head, FSDPModule):
            self.lm_head.unshard()
        return loss, metrics

    def compute(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss itself, for subclasses to add to."""
        return super().__call__(pred, labels, global_valid_tokens, **loss_inputs)


@dataclass
class _Chunks:
    """What the chunks of one loss call share."""

    term: Callable[[Tensor, Tensor, slice], Tensor]
    """Auxiliary term, a sum over some positions, from their hidden states, labels and place."""

    ntp: Tensor
    value: Tensor
    gradient_square: Tensor
    """Of the weighted term's gradient of the hidden states."""

    hidden: Tensor | None = None
    """Hidden states of the chunk at hand, a leaf of its graph."""

    start: int = 0
    index: int = 0


class NITPLoss(ChunkedLoss):
    """NTP cross-entropy as in TorchTitan, plus ``weight`` times the auxiliary objective.

    The auxiliary term is part of the loss of each chunk of the cross-entropy: the hidden states are split once, each
    chunk is differentiated once, and the projector's activations never exist for all positions. The step's weight and
    divisor live in tensors that are written in place: CUDA graphs replay the step with whatever they hold.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLoss.Config):
        nitp: NITPConfig = field(default_factory=NITPConfig)

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        super().__init__(config, compile_config=compile_config)
        self.settings = config.nitp
        self.distance = find_loss(config.nitp.loss)
        self.fn = nitp_loss_sum
        self._maybe_compile(compile_config)
        self.projector: nn.Module | None = None
        self.ntp_loss, self.loss_fn = self.loss_fn, self._chunk_loss
        self._chunks: _Chunks | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """As `ChunkedLossWrapper.set_lm_head`."""
        super().set_lm_head(lm_head)
        lm_head.register_forward_pre_hook(self._see_hidden)

    def _see_hidden(self, lm_head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._chunks is not None:
            self._chunks.hidden = inputs[0]

    def prepare(self, projector: nn.Module | None, *, num_microbatches: int, device: torch.device) -> None:
        """Give the loss its projector and its per-step tensors; once, after the model is built.

        Args:
            projector: of the last pipeline stage; None on ranks without it.
            num_microbatches: loss calls per optimizer step.
            device: where the loss is computed.
        """
        self.projector = projector
        self.weight = torch.zeros((), device=device)
        self.num_terms = torch.ones((), device=device)
        # NTP part, NITP part and norm of the NITP part's gradient of h, of the last micro-batches, newest first.
        # A shift register, not a sum: the metadata pass of the first pipeline step simply falls out at the end.
        self.figures = torch.zeros(num_microbatches, 3, device=device)
        self.parts = self.figures[:, :2]

    def set_step(self, *, weight: float, num_terms: Tensor) -> None:
        """Set the step's weight and the global number of terms that the objective averages."""
        self.weight.fill_(weight)
        self.num_terms.copy_(num_terms.clamp(min=1))

    def compute(
        self,
        pred: Tensor | tuple[Tensor, ...],
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss, scaled by global counts.

        Args:
            pred: in training hidden states [batch, length, dim] with what their targets are made of
                (`NITPDecoder.with_target`); hidden states alone otherwise.
            labels: [batch, length], `IGNORE_INDEX` where a position is not trained.
            global_valid_tokens: number of labels of the global batch, scalar.

        Returns:
            This rank's share of ``ce / tokens + weight * nitp / positions`` and no metrics.
        """
        h_BLD, *target = pred if isinstance(pred, tuple) else (pred,)
        if not h_BLD.requires_grad:
            self._show_projection(h_BLD, labels)
            return super().compute(h_BLD, labels, global_valid_tokens, **loss_inputs)
        with spmd.local(), spmd.no_typecheck():
            learning = [z.detach().requires_grad_() for z in target[:1] if z.requires_grad]
            if self.settings.objective == "cosine_regularizer":
                term = self._regularizer_term(h_BLD, labels)
            else:
                term = self._nitp_term(*learning or target[:1], *target[1:], labels)
            zero = torch.zeros((), dtype=torch.float32, device=self.weight.device)
            self._chunks = chunks = _Chunks(term, ntp=zero, value=zero, gradient_square=zero)
        with _unsharded_projector(self.projector) as self._before_last_chunk:
            loss, metrics = super().compute(h_BLD, labels, global_valid_tokens, **loss_inputs)
        self._chunks = None
        with spmd.local(), spmd.no_typecheck():
            newest = torch.stack([chunks.ntp, chunks.value, chunks.gradient_square.sqrt()])
            self.figures.copy_(torch.cat([newest[None], self.figures[:-1]]))
            for z, leaf in zip(target, learning):
                # Without stop-gradient; its value is in the loss already.
                share = self._gradient_backprop(z, leaf.grad, torch.zeros_like(chunks.value), self.lm_head, False)
                loss = loss + _placed_as(loss, share)
            return loss, metrics

    def _chunk_loss(
        self, logits: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a chunk, which ChunkedLossWrapper differentiates."""
        loss, metrics = self.ntp_loss(logits, labels, global_valid_tokens, **loss_inputs)
        chunks = self._chunks
        if chunks is None:
            return loss, metrics
        is_type_checking = spmd.is_type_checking()
        with spmd.no_typecheck():
            if chunks.index == self.num_chunks - 1:
                self._before_last_chunk()
            # An alias, whose gradient is that of the auxiliary term alone.
            hidden = chunks.hidden.view_as(chunks.hidden)
            hidden.register_hook(self._see_gradient)
            labels = local(labels)
            positions = slice(chunks.start, chunks.start + labels.shape[1])
            share = chunks.term(hidden, labels, positions) / self.num_terms
            chunks.ntp = chunks.ntp + local(loss).detach().float()
            chunks.value = chunks.value + share.detach()
            chunks.start, chunks.index, chunks.hidden = positions.stop, chunks.index + 1, None
            loss = loss + _placed_as(loss, self.weight * share)
            if is_type_checking:
                spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, metrics

    def _see_gradient(self, gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(local(gradient), dtype=torch.float32)
        self._chunks.gradient_square = self._chunks.gradient_square + norm.square()

    def _nitp_term(self, z_BLD: Tensor, following_BRD: Tensor, valid_BL: Tensor, labels: Tensor) -> Callable:
        show = self._projection_shower(labels)

        def term(h: Tensor, labels: Tensor, positions: slice) -> Tensor:
            prediction = local(self.projector(h))
            show(prediction)
            target = next_implicit_tokens(z_BLD, following_BRD, positions.start, positions.stop)
            valid = valid_BL[:, positions] & (labels != IGNORE_INDEX)
            return self.fn(prediction, target, valid, self.distance)

        return term

    def _projection_shower(self, labels: Tensor) -> Callable[[Tensor], None]:
        """Shows the meter the projections of a micro-batch, chunk after chunk."""
        shown = 0

        def show(prediction: Tensor) -> None:
            nonlocal shown
            if self.meter is not None:
                self.meter.see(PROJECTED, prediction, labels, start=shown)
            shown += prediction.shape[1]

        return show

    def _show_projection(self, h_BLD: Tensor, labels: Tensor) -> None:
        """Project hidden states of a validation for the meter alone."""
        if self.meter is None or not self.meter.active or self.settings.objective != "nitp":
            return
        show = self._projection_shower(labels)
        with spmd.local(), spmd.no_typecheck(), _unsharded_projector(self.projector):
            for chunk in local(h_BLD).chunk(self.num_chunks, dim=1):
                show(local(self.projector(_placed_as(h_BLD, chunk.contiguous()))))

    def _regularizer_term(self, h_BLD: Tensor, labels: Tensor) -> Callable:
        with torch.no_grad():
            labelled = local(labels) != IGNORE_INDEX
            chunks = zip(*(x.chunk(self.num_chunks, dim=1) for x in (local(h_BLD).detach(), labelled)))
            directions, counts = (sum(parts) for parts in zip(*(direction_sums(h, valid) for h, valid in chunks)))
            group = context_parallel_group(h_BLD)
            if group is not None:
                directions, counts = (funcol.all_reduce(x, "sum", group) for x in (directions, counts))

        def term(h: Tensor, labels: Tensor, positions: slice) -> Tensor:
            return cosine_regularizer_sum(local(self.projector(h)), labels != IGNORE_INDEX, directions, counts)

        return term


def _placed_as(reference: Tensor, part: Tensor) -> Tensor:
    """This rank's part as a DTensor on the mesh of ``reference``, if that is one."""
    if not isinstance(reference, DTensor):
        return part
    return DTensor.from_local(part, reference.device_mesh, reference.placements)


@contextmanager
def _unsharded_projector(projector: nn.Module) -> Iterator[Callable[[], None]]:
    """Keep an FSDP projector gathered over all chunks and reduce its gradient once.

    Yields a function to call before the last chunk. ChunkedLossWrapper treats lm_head the same way.
    """
    if not isinstance(projector, FSDPModule):
        yield lambda: None
        return
    projector.set_reshard_after_forward(False)
    projector.set_reshard_after_backward(False)
    projector.set_requires_gradient_sync(False)
    with spmd.no_typecheck():
        projector.unshard()
    yield lambda: projector.set_requires_gradient_sync(True)
    projector.set_reshard_after_forward(True)
    projector.set_reshard_after_backward(True)
    projector.reshard()
