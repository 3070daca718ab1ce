"""Chunked cross-entropy plus the chunked NITP loss (Eq. 4)."""

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
from torchtitan.components.loss import ChunkedLossWrapper, GradAccumulator, IGNORE_INDEX
from torchtitan.config import CompileConfig

from nitp_titan.config import NITPConfig, UserError
from nitp_titan.meter import GeometryMeter, HIDDEN, PROJECTED
from nitp_titan.nitp import context_parallel_group, local
from nitp_titan.objective import cosine_regularizer_terms, direction_sums, LOSSES, nitp_loss_sum


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


class NITPLoss(ChunkedLoss):
    """NTP cross-entropy as in TorchTitan, plus ``weight`` times the auxiliary objective.

    Like the cross-entropy, the auxiliary term is computed and differentiated chunk by chunk
    of the sequence, so that the projector's activations never exist for all positions.
    The step's weight and divisor live in tensors that are written in place: CUDA graphs
    replay the step with whatever they hold.
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
        pred: Tensor | tuple[Tensor, Tensor, Tensor],
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss, scaled by global counts.

        Args:
            pred: hidden states [batch, length, dim] with targets [batch, length, dim] and
                their validity [batch, length] in training; hidden states alone otherwise.
            labels: [batch, length], `IGNORE_INDEX` where a position is not trained.
            global_valid_tokens: number of labels of the global batch, scalar.

        Returns:
            This rank's share of ``ce / tokens + weight * nitp / positions`` and no metrics.
        """
        h_BLD, *target = pred if isinstance(pred, tuple) else (pred,)
        ntp, metrics = super().compute(h_BLD, labels, global_valid_tokens, **loss_inputs)
        if not h_BLD.requires_grad:
            self._show_projection(h_BLD, labels)
            return ntp, metrics
        with spmd.local(), spmd.no_typecheck():
            labelled_BL = local(labels) != IGNORE_INDEX
            if self.settings.objective == "cosine_regularizer":
                total, value, gradient = self._regularizer(h_BLD, labelled_BL)
            else:
                target_BLD, valid_BL = target
                total, value, gradient = self._nitp(h_BLD, target_BLD, valid_BL & labelled_BL, labels)
            newest = torch.stack([local(ntp).detach().float(), value, gradient])
            self.figures.copy_(torch.cat([newest[None], self.figures[:-1]]))
            return ntp + _placed_as(ntp, total), metrics

    def _nitp(self, h_BLD: Tensor, target_BLD: Tensor, valid_BL: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        show = self._projection_shower(labels)

        def term(h: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
            prediction = self._projected(h, h_BLD)
            show(prediction)
            loss = self.fn(prediction, target, valid, self.distance)
            return loss, loss.detach()

        with _unsharded_projector(self.projector) as before_last_backward:
            return self._chunked(term, (local(h_BLD), target_BLD), (valid_BL,), before_last_backward)

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
            for chunk in local(h_BLD).chunk(self.settings.num_chunks, dim=1):
                show(self._projected(chunk.contiguous(), h_BLD))

    def _projected(self, chunk: Tensor, h_BLD: Tensor) -> Tensor:
        return local(self.projector(_placed_as(h_BLD, chunk)))

    def _regularizer(self, h_BLD: Tensor, valid_BL: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            chunks = zip(*(x.chunk(self.settings.num_chunks, dim=1) for x in (local(h_BLD).detach(), valid_BL)))
            directions, counts = (sum(parts) for parts in zip(*(direction_sums(h, valid) for h, valid in chunks)))
            group = context_parallel_group(h_BLD)
            if group is not None:
                directions, counts = (funcol.all_reduce(x, "sum", group) for x in (directions, counts))

        def term(h: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
            return cosine_regularizer_terms(self._projected(h, h_BLD), valid, directions, counts)

        return self._chunked(term, (local(h_BLD),), (valid_BL,), lambda: None)

    def _chunked(
        self,
        term: Callable[..., tuple[Tensor, Tensor]],
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        before_last_backward: Callable[[], None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiate ``term`` chunk by chunk and hand the gradients to the states' graphs.

        Returns:
            The weighted term, differentiable once, its plain value, and the norm of the weighted term's gradient of the
            first state; all this rank's share.
        """
        num_chunks = self.settings.num_chunks
        learning = [state for state in states if state.requires_grad]
        gradients = [GradAccumulator(state, num_chunks=num_chunks, dtype=torch.float32) for state in learning]
        value = torch.zeros((), dtype=torch.float32, device=states[0].device)
        chunks = zip(*(x.detach().chunk(num_chunks, dim=1) for x in (*states, *masks)))
        for index, chunk in enumerate(chunks):
            leaves = [part.contiguous().requires_grad_(state.requires_grad) for part, state in zip(chunk, states)]
            surrogate, chunk_value = term(*leaves, *chunk[len(states) :])
            if index == num_chunks - 1:
                before_last_backward()
            (self.weight * surrogate / self.num_terms).backward()
            for gradient, leaf in zip(gradients, [leaf for leaf in leaves if leaf.requires_grad]):
                gradient.add(leaf.grad)
            value += chunk_value / self.num_terms

        # The loss value travels with the first state; TorchTitan's bridge ignores the gradient
        # that reaches it, so the weight is in the accumulated gradients already.
        shares = [self.weight * value] + [torch.zeros_like(value)] * (len(learning) - 1)
        results = [gradient.result() for gradient in gradients]
        total = sum(
            self._gradient_backprop(state, result.to(state.dtype), share, self.lm_head, False)
            for state, result, share in zip(learning, results, shares)
        )
        return total, value, torch.linalg.vector_norm(results[0])


def _placed_as(reference: Tensor, part: Tensor) -> Tensor:
    """This rank's part as a DTensor on the mesh of ``reference``, if that is one."""
    if not isinstance(reference, DTensor):
        return part
    return DTensor.from_local(part, reference.device_mesh, reference.placements)


@contextmanager
def _unsharded_projector(projector: nn.Module) -> Iterator[Callable[[], None]]:
    """Keep an FSDP projector gathered over all chunks and reduce its gradient once.

    Yields a function to call before the last chunk's backward. ChunkedLossWrapper treats
    lm_head the same way.
    """
    if not isinstance(projector, FSDPModule):
        yield lambda: None
        return
    projector.set_reshard_after_forward(False)
    projector.set_reshard_after_backward(False)
    projector.set_requires_gradient_sync(False)
    projector.unshard()
    yield lambda: projector.set_requires_gradient_sync(True)
    projector.set_reshard_after_forward(True)
    projector.set_reshard_after_backward(True)
    projector.reshard()
