"""Cross-entropy plus the weighted objective, chunk by chunk (Eq. 4).

Suffixes: B batch, L (local) length, D model dim.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import spmd_types as spmd
import torch
from torch import nn, Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import ChunkedLossWrapper, GradAccumulator
from torchtitan.config import CompileConfig
from torchtitan.models.common.feed_forward import FeedForward

from nitp_titan.objectives.objective import local, Microbatch, MicrobatchTerms, Observer
from nitp_titan.objectives.registry import build_objective
from nitp_titan.objectives.settings import NITPConfig
from nitp_titan.objectives.sites import HIDDEN, PROJECTED


class ChunkedLoss(ChunkedLossWrapper):
    """TorchTitan's chunked cross-entropy, right under schedules that split the backward pass too.

    It shows the hidden states to an observer.
    """

    observer: Observer | None = None
    """Set by the trainer, whose base class builds the loss before the ranks have a mesh to measure on."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        reshard_lm_head: bool = True
        """Reshard final norm and unembedding, which are one FSDP unit, after the loss, as ChunkedLossWrapper does.

        Zero-bubble schedules look up the module's parameters in the autograd graph. They must find the gathered ones,
        or the norm's gradient is lost.
        """

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        super().__init__(config, compile_config=compile_config)
        self.reshard_lm_head = config.reshard_lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `ChunkedLossWrapper.__call__`."""
        if self.observer is not None:
            self.observer.observe(HIDDEN, pred[0] if isinstance(pred, tuple) else pred, labels)
        loss, metrics = self.compute(pred, labels, global_valid_tokens, **loss_inputs)
        # After every backward pass inside the loss: each of them reshards all that it finds gathered.
        if not self.reshard_lm_head and loss.requires_grad and isinstance(self.lm_head, FSDPModule):
            self.lm_head.unshard()
        return loss, metrics

    def compute(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss itself, for subclasses to add to."""
        return super().__call__(pred, labels, global_valid_tokens, **loss_inputs)


# Live bfloat16 values per token of a chunk, which decide the number of chunks: about 8 tensors of the projector's width
# (gate, up, their product, its gradient ...), about 5 of the vocabulary (logits; in float32 log-softmax and gradient).
_PROJECTOR_VALUES, _LOGIT_VALUES = 8, 5


class AuxiliaryLoss(ChunkedLoss):
    """The NTP loss as in TorchTitan, plus ``weight`` times the auxiliary objective.

    After the cross-entropy and like it, the auxiliary loss is computed and differentiated chunk by chunk of the
    sequence, in as few chunks as need no more memory than the logits. The projector's gathered weights and gradient
    (12 d^2 in bfloat16 and in float32) then never exist beside those of the unembedding and the logits, where memory is
    at its peak. The step's weight and divisor live in tensors that are written in place: CUDA graphs replay the step
    with whatever they hold.
    """

    projector: nn.Module
    """Ranks without the last pipeline stage have none and compute no loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLoss.Config):
        nitp: NITPConfig = field(default_factory=NITPConfig)

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        super().__init__(config, compile_config=compile_config)
        self.objective = build_objective(config.nitp)
        if compile_config is not None and compile_config.enable and "loss" in compile_config.components:
            self.objective.compile(compile_config.backend)

    def attach(self, projector: nn.Module | None, *, num_microbatches: int, device: torch.device) -> None:
        """Give the loss its projector and its per-step tensors; once, after the model is built.

        Args:
            projector: of the last pipeline stage; None on ranks without it.
            num_microbatches: loss calls per optimizer step.
            device: where the loss is computed.
        """
        if projector is not None:
            self.projector = projector
            self.num_auxiliary_chunks = self._fewest_chunks()
        self.weight = torch.zeros((), device=device)
        self.num_terms = torch.ones((), device=device)
        self.stats = torch.zeros(num_microbatches, 3, device=device)
        """Of the last micro-batches, newest first: NTP loss, auxiliary loss and norm of the auxiliary gradient of h.

        A shift register, not a sum: the metadata pass of the first pipeline step simply falls out at the end."""
        self.losses = self.stats[:, :2]

    def _fewest_chunks(self) -> int:
        """A divisor of the cross-entropy's chunks. Each costs a pass over the projector's weights and gradient."""
        if not isinstance(self.projector, FeedForward):
            return 1
        projected = _PROJECTOR_VALUES * self.projector.w1.out_features
        wanted = self.num_chunks * projected / (_LOGIT_VALUES * self.lm_head.out_features)
        divisors = (n for n in range(1, self.num_chunks) if self.num_chunks % n == 0 and n >= wanted)
        return next(divisors, self.num_chunks)

    def begin_step(self, *, weight: float, num_terms: Tensor) -> None:
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
            This rank's share of ``ntp / tokens + weight * auxiliary / terms`` and no metrics.
        """
        h_BLD, *captured = pred if isinstance(pred, tuple) else (pred,)
        if not h_BLD.requires_grad:
            self._observe_projection(h_BLD, labels)
            return super().compute(h_BLD, labels, global_valid_tokens, **loss_inputs)
        ntp, metrics = super().compute(h_BLD, labels, global_valid_tokens, **loss_inputs)
        with spmd.local(), spmd.no_typecheck():
            terms = self.objective.microbatch(
                Microbatch(h_BLD, labels, captured, self.projector, self.num_chunks, self.observer)
            )
            gradient, auxiliary = self._chunked(terms, h_BLD, labels)
            newest = torch.stack([local(ntp).detach().float(), auxiliary, torch.linalg.vector_norm(gradient)])
            self.stats.copy_(torch.cat([newest[None], self.stats[:-1]]))
            total = self._with_gradient(local(h_BLD), gradient.to(h_BLD.dtype), self.weight * auxiliary)
            for captured_state, its_gradient in terms.captured_gradients():
                # Its value is in the loss already.
                total = total + self._with_gradient(captured_state, its_gradient, torch.zeros_like(auxiliary))
            return ntp + _placed_as(ntp, total), metrics

    def _with_gradient(self, state: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        """A loss of this value whose gradient of a state is known."""
        return self._gradient_backprop(state, gradient, value, self.lm_head, False)

    def _chunked(self, terms: MicrobatchTerms, h_BLD: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted objective's gradient of the hidden states, float32, chunk by chunk, and its plain value."""
        accumulated = GradAccumulator(local(h_BLD), num_chunks=self.num_auxiliary_chunks, dtype=torch.float32)
        value = torch.zeros((), dtype=torch.float32, device=self.weight.device)
        with GatheredProjector(self.projector, self.lm_head) as gathered:
            for chunk, h, labels_BL in _chunks(h_BLD.detach(), labels, self.num_auxiliary_chunks):
                if chunk.stop == local(labels).shape[1]:
                    gathered.reduce_gradient()
                leaf = h.contiguous().requires_grad_()
                share = terms.sum(_placed_as(h_BLD, leaf), labels_BL, chunk) / self.num_terms
                (self.weight * share).backward()
                accumulated.add(leaf.grad)
                value = value + share.detach()
        return accumulated.result(), value

    def _observe_projection(self, h_BLD: Tensor, labels: Tensor) -> None:
        """Project hidden states of a validation for the observer alone."""
        if PROJECTED not in self.objective.sites or self.observer is None or not self.observer.observes(labels):
            return
        with spmd.local(), spmd.no_typecheck(), GatheredProjector(self.projector):
            for chunk, h, _ in _chunks(h_BLD, labels, self.num_chunks):
                projected = local(self.projector(_placed_as(h_BLD, h.contiguous())))
                self.observer.observe(PROJECTED, projected, labels, start=chunk.start)


def _chunks(h_BLD: Tensor, labels: Tensor, num_chunks: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """This rank's hidden states and labels, chunk by chunk of the sequence, with the local positions of each."""
    start = 0
    for h, labels_BL in zip(*(local(x).chunk(num_chunks, dim=1) for x in (h_BLD, labels))):
        yield slice(start, start + h.shape[1]), h, labels_BL
        start += h.shape[1]


def _placed_as(reference: Tensor, part: Tensor) -> Tensor:
    """This rank's part as a DTensor on the mesh of ``reference``, if that is one."""
    if not isinstance(reference, DTensor):
        return part
    return DTensor.from_local(part, reference.device_mesh, reference.placements)


class GatheredProjector:
    """Context in which an FSDP projector stays gathered over all chunks, and its gradient is reduced once.

    ChunkedLossWrapper treats lm_head the same way. Without FSDP it does nothing.

    Args:
        projector: of the objective's module.
        lm_head: the unembedding, whose unit FSDP gathers ahead in between; None without a backward pass.
    """

    def __init__(self, projector: nn.Module, lm_head: nn.Module | None = None):
        self.projector = projector if isinstance(projector, FSDPModule) else None
        self.lm_head = lm_head if self.projector is not None and isinstance(lm_head, FSDPModule) else None

    def __enter__(self) -> "GatheredProjector":
        if self.projector is not None:
            self._reshard(False)
            self.projector.set_requires_gradient_sync(False)
            # Otherwise FSDP takes the end of each chunk's backward pass for the end of the step's, and forgets the
            # order of the layers: none of them would be gathered ahead of its backward pass.
            self.projector.set_is_last_backward(False)
            with spmd.no_typecheck():
                self.projector.unshard()
        return self

    def reduce_gradient(self) -> None:
        """Reduce the gradient in the next backward pass; call it before the last chunk."""
        if self.projector is not None:
            self.projector.set_requires_gradient_sync(True)

    def __exit__(self, *exception: object) -> None:
        if self.projector is not None:
            self.projector.set_is_last_backward(True)
            self._reshard(True)
            self.projector.reshard()

    def _reshard(self, after: bool) -> None:
        if self.projector is not None:
            self.projector.set_reshard_after_forward(after)
            self.projector.set_reshard_after_backward(after)
        if self.lm_head is not None:
            # FSDP gathers final norm and unembedding ahead here; the decoder's backward pass needs them next.
            self.lm_head.set_reshard_after_backward(after, recurse=False)


def with_objective_loss(
    loss: ChunkedLossWrapper.Config, settings: NITPConfig, *, observed: bool, splits_backward: bool
) -> ChunkedLossWrapper.Config:
    """The loss that a run trains: TorchTitan's own for NTP, except where that would be wrong.

    Args:
        loss: of the config, that of NTP alone.
        settings: the `[nitp]` table.
        observed: whether hidden states are measured.
        splits_backward: whether the pipeline schedule computes gradients of inputs and of weights apart.
    """
    if not (settings.enabled or observed or splits_backward):
        return loss
    fields = {each.name: getattr(loss, each.name) for each in dataclasses.fields(ChunkedLossWrapper.Config)}
    fields["reshard_lm_head"] = not splits_backward
    return AuxiliaryLoss.Config(**fields, nitp=settings) if settings.enabled else ChunkedLoss.Config(**fields)
