"""Cross-entropy plus the NITP loss, chunk by chunk (Eq. 4)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
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
from torchtitan.models.common.feed_forward import FeedForward

from nitp_titan.config.sections import NITPConfig
from nitp_titan.errors import UserError
from nitp_titan.geometry.tracker import GeometryMeter, HIDDEN, PROJECTED
from nitp_titan.objectives.maths import (
    cosine_regularizer_sum,
    direction_sums,
    LOSSES,
    next_implicit_tokens,
    nitp_loss_sum,
)
from nitp_titan.objectives.nitp import context_parallel_group, local


@cache
def find_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The distance that `[nitp] loss` names: a key of `LOSSES`, or ``module:function`` of another package.

    Raises:
        UserError: if there is no such module or function, or it is not a distance that can be trained (`_try_loss`).
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
    if (reason := _try_loss(found)) is not None:
        raise UserError(
            f"[nitp] loss = '{name}' {reason}. It takes prediction and target, float32 [batch, length, dim], and "
            "returns one number per position, [batch, length].",
            table="nitp",
            key="loss",
        )
    return found


def _try_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> str | None:
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


# Numbers of 2 bytes that exist for each token in a chunk of a loss: of the projector's hidden width (gate, up, their
# product, its gradient ...), and of the vocabulary (logits, and in float32 their log-softmax and gradient).
_PROJECTOR_NUMBERS, _LOGIT_NUMBERS = 8, 5


class NITPLoss(ChunkedLoss):
    """NTP cross-entropy as in TorchTitan, plus ``weight`` times the auxiliary objective.

    Like the cross-entropy and after it, the auxiliary term is computed and differentiated chunk by chunk of the
    sequence, in as few chunks as need no more memory than those of the cross-entropy. The projector's gathered weights
    and gradient (12 d^2 in bfloat16 and in float32) then never exist beside those of the unembedding and the logits,
    where memory is at its peak. The step's weight and divisor live in tensors that are written in place: CUDA graphs
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
        self.num_nitp_chunks = self._fewest_chunks()
        self.weight = torch.zeros((), device=device)
        self.num_terms = torch.ones((), device=device)
        # NTP part, NITP part and norm of the NITP part's gradient of h, of the last micro-batches, newest first.
        # A shift register, not a sum: the metadata pass of the first pipeline step simply falls out at the end.
        self.figures = torch.zeros(num_microbatches, 3, device=device)
        self.parts = self.figures[:, :2]

    def _fewest_chunks(self) -> int:
        """A divisor of the cross-entropy's chunks. Each costs a pass over the projector's weights and gradient."""
        if not isinstance(self.projector, FeedForward):
            return 1
        projected = _PROJECTOR_NUMBERS * self.projector.w1.out_features
        wanted = self.num_chunks * projected / (_LOGIT_NUMBERS * self.lm_head.out_features)
        divisors = (n for n in range(1, self.num_chunks) if self.num_chunks % n == 0 and n >= wanted)
        return next(divisors, self.num_chunks)

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
        ntp, metrics = super().compute(h_BLD, labels, global_valid_tokens, **loss_inputs)
        with spmd.local(), spmd.no_typecheck():
            learning = [z.detach().requires_grad_() for z in target[:1] if z.requires_grad]
            if self.settings.objective == "cosine_regularizer":
                term = self._regularizer_term(h_BLD, labels)
            else:
                term = self._nitp_term(*learning or target[:1], *target[1:], labels)
            with _unsharded_projector(self.projector, self.lm_head) as before_last_chunk:
                gradient, value = self._chunked(term, h_BLD, labels, before_last_chunk)
            newest = torch.stack([local(ntp).detach().float(), value, torch.linalg.vector_norm(gradient)])
            self.figures.copy_(torch.cat([newest[None], self.figures[:-1]]))
            total = self._gradient_backprop(
                local(h_BLD), gradient.to(h_BLD.dtype), self.weight * value, self.lm_head, False
            )
            for z, leaf in zip(target, learning):
                # Without stop-gradient; its value is in the loss already.
                total = total + self._gradient_backprop(z, leaf.grad, torch.zeros_like(value), self.lm_head, False)
            return ntp + _placed_as(ntp, total), metrics

    def _chunked(
        self, term: Callable, h_BLD: Tensor, labels: Tensor, before_last_chunk: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """The weighted term's gradient of the hidden states, float32, chunk by chunk, and its plain value."""
        num_chunks = self.num_nitp_chunks
        gradient = GradAccumulator(local(h_BLD), num_chunks=num_chunks, dtype=torch.float32)
        value, start = torch.zeros((), dtype=torch.float32, device=self.weight.device), 0
        parts = [local(x).chunk(num_chunks, dim=1) for x in (h_BLD.detach(), labels)]
        for index, (h, labels) in enumerate(zip(*parts)):
            if index == num_chunks - 1:
                before_last_chunk()
            leaf = h.contiguous().requires_grad_()
            share = term(_placed_as(h_BLD, leaf), labels, slice(start, start + labels.shape[1])) / self.num_terms
            (self.weight * share).backward()
            gradient.add(leaf.grad)
            value, start = value + share.detach(), start + labels.shape[1]
        return gradient.result(), value

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
        if self.meter is None or not self.meter.measures(labels) or self.settings.objective != "nitp":
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
def _unsharded_projector(projector: nn.Module, lm_head: nn.Module | None = None) -> Iterator[Callable[[], None]]:
    """Keep an FSDP projector gathered over all chunks and reduce its gradient once.

    Yields a function to call before the last chunk. ChunkedLossWrapper treats lm_head the same way.
    """
    if not isinstance(projector, FSDPModule):
        yield lambda: None
        return
    projector.set_reshard_after_forward(False)
    projector.set_reshard_after_backward(False)
    projector.set_requires_gradient_sync(False)
    # Otherwise FSDP takes the end of each chunk's backward pass for the end of the step's, and forgets the order of the
    # layers: none of them would be gathered ahead of its backward pass.
    projector.set_is_last_backward(False)
    # FSDP gathers the final norm and the unembedding ahead here; the decoder's backward pass needs them next.
    if isinstance(lm_head, FSDPModule):
        lm_head.set_reshard_after_backward(False, recurse=False)
    with spmd.no_typecheck():
        projector.unshard()
    yield lambda: projector.set_requires_gradient_sync(True)
    if isinstance(lm_head, FSDPModule):
        lm_head.set_reshard_after_backward(True, recurse=False)
    projector.set_is_last_backward(True)
    projector.set_reshard_after_forward(True)
    projector.set_reshard_after_backward(True)
    projector.reshard()
