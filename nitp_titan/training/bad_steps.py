"""Stops training at a number that is not finite, before the optimizer can take it, or leaves such steps out.

Every step's loss and gradients are summed up in one small tensor, which the host reads before clipping and optimizer.
That wait costs little: TorchTitan's copies of the inputs to the device block, so that the host never runs ahead by more
than a step anyway. Only the launch of clipping and optimizer waits for the backward pass.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import spmd_types as spmd
import torch
import torch.distributed as dist
from torch import nn, Tensor
from torch.distributed.tensor import DTensor

from nitp_titan.errors import invalid, UserError
from nitp_titan.objectives.objective import local
from nitp_titan.training.metrics import NITPMetrics

# Modules that only one part of the loss reaches.
_PARTS = {"nitp": "nitp ", "lm_head": "ntp "}


@dataclass(kw_only=True, slots=True)
class BadStepsConfig:
    """Bad steps: their loss or gradient, over all ranks, is not finite, or is a spike."""

    max_skipped_steps: int = 0
    """Bad steps that a run may leave out, resumed parts included, before it stops; 0 stops at the first."""

    skip_above: float | None = None
    """Norm of the gradient before clipping above which a step is a spike; none: only what is not finite is bad."""

    def __post_init__(self) -> None:
        self._require("max_skipped_steps", self.max_skipped_steps >= 0, "at least 0")
        if self.skip_above is not None:
            self._require("skip_above", 0 < self.skip_above < float("inf"), "a finite number above 0, or 'none'")
            self._require("skip_above", self.max_skipped_steps > 0, "'none' while max_skipped_steps = 0 skips no step")

    def _require(self, key: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise invalid("bad_steps", key, getattr(self, key), allowed)


class StepSkipped(Exception):
    """Raised on all ranks instead of clipping and the optimizer; for `NITPTrainer.train_step` alone."""


class BadModule(NamedTuple):
    """The layer, or other part of the model, nearest to the loss that has bad gradients or weights on a rank."""

    place: tuple[int, int]
    """Pipeline stage and order within; the greater is nearer to the loss."""

    name: str
    norms: dict[str, float]
    """Of its tensors, those that are not finite."""


@dataclass(frozen=True)
class Finding:
    """Facts of one rank on a bad step."""

    losses: dict[str, float] = field(default_factory=dict)
    """This rank's share of the global mean, by part: ntp, and nitp if it is trained; empty without a loss."""

    nitp_gradient: float = 0.0
    """Norm of the NITP loss's gradient of the last hidden states, summed over micro-batches."""

    backward: float = 0.0
    """Norm of the gradient that came back to the token embeddings, summed over micro-batches."""

    module: BadModule | None = None
    num_skipped: int = 0


class BadSteps:
    """Watches the loss and the gradient of every step, and the weights of every checkpoint.

    A step is bad if its loss or the norm of its gradient, over all ranks, is not finite, or if the norm is above
    `[bad_steps] skip_above`. All ranks judge by the same two numbers. Its methods are collectives.

    Args:
        settings: the `[bad_steps]` table.
        model_parts: as the trainer's.
        num_losses: calls of `observe` per step.
        loss_stats: of `AuxiliaryLoss`, [micro-batches, 3]; None for NTP alone.
        has_loss: whether this rank computes a loss.
        num_loss_shares: ranks whose losses add up to the global one; other ranks repeat them.
        stage: of the pipeline.
        device: of the loss.
        metrics: counts the skipped steps of the run.
        last_checkpoint: path of the latest whole checkpoint.
    """

    def __init__(
        self,
        settings: BadStepsConfig,
        *,
        model_parts: Sequence[nn.Module],
        num_losses: int,
        loss_stats: Tensor | None,
        has_loss: bool,
        num_loss_shares: int,
        stage: int,
        device: torch.device,
        metrics: NITPMetrics,
        last_checkpoint: Callable[[], str | None],
    ):
        self.settings, self.model_parts, self.metrics = settings, model_parts, metrics
        self.parameters = {name: p for part in model_parts for name, p in part.named_parameters() if p.requires_grad}
        self.loss_stats, self.has_loss, self.num_loss_shares = loss_stats, has_loss, num_loss_shares
        self.stage, self.last_checkpoint = stage, last_checkpoint
        self.losses = torch.zeros(num_losses, device=device)
        self.backward = torch.zeros(1, device=device)
        self.device = self.losses.device
        self._num_seen = 0
        self._shares: Tensor | None = None
        if (embeddings := getattr(model_parts[0], "tok_embeddings", None)) is not None:
            embeddings.register_forward_hook(self._watch_backward)

    def _watch_backward(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """A bad number in a rank's backward pass comes out here, before gradients are summed over ranks."""
        if output.requires_grad:
            with spmd.no_typecheck():
                output.register_hook(lambda gradient: self._add_backward(local(gradient)))

    @torch.no_grad()
    def _add_backward(self, gradient: Tensor) -> None:
        self.backward.add_(torch.linalg.vector_norm(gradient, dtype=torch.float32))

    @torch.no_grad()
    def observe(self, step: int, loss: Tensor) -> None:
        """Take in the loss of a part of a step, after its backward pass, and judge the step after the last part.

        Args:
            step: of the optimizer.
            loss: this rank's share, one number.

        Raises:
            UserError: if the step is bad, with the step, the rank, the part of the loss and the last checkpoint.
            StepSkipped: if it is bad and may be left out.
        """
        self.losses[self._num_seen].copy_(local(loss.detach()).reshape(()))
        self._num_seen += 1
        if self._num_seen == len(self.losses):
            self._num_seen = 0
            self._judge(step, self.measure().tolist())

    def measure(self) -> Tensor:
        """A step's numbers, float32 on the device; `_judge` takes them apart.

        Returns:
            [7 + parameters]: squared norm of the global gradient, 0 times the global loss; of this rank the loss, NTP
            loss, auxiliary loss, norm of the auxiliary gradient of h, norm of the gradient of the embeddings, and of
            each parameter's gradient.
        """
        gradients = [local(p.grad) if p.grad is not None else self.backward.new_zeros(1) for p in self._all()]
        norms = _norms(gradients).to(self.device)
        if self._shares is None:
            self._shares = torch.tensor([_share(p) for p in self._all()], device=self.device)
        # A loss that is not finite makes its product with 0 not finite either, and then the sum over ranks.
        verdict = torch.stack([(norms.square() * self._shares).sum(), (0 * self.losses).sum()])
        if dist.get_world_size() > 1:
            dist.all_reduce(verdict)
        parts = self.loss_stats.sum(0) if self.loss_stats is not None else verdict.new_zeros(3)
        numbers = torch.cat([verdict, self.losses.sum()[None], parts, self.backward, norms])
        self.backward.zero_()
        return numbers

    def _all(self) -> list[nn.Parameter]:
        return list(self.parameters.values())

    def _judge(self, step: int, numbers: list[float]) -> None:
        square, loss, total, ntp, nitp, nitp_gradient, backward, *norms = numbers
        gradient = math.sqrt(square) if square >= 0 else math.nan
        limit = math.inf if self.settings.skip_above is None else self.settings.skip_above
        if math.isfinite(loss) and math.isfinite(gradient) and gradient <= limit:
            return
        losses = {"ntp": total} if self.loss_stats is None else {"ntp": ntp, "nitp": nitp}
        findings = self._gather(
            Finding(
                losses=losses if self.has_loss else {},
                nitp_gradient=nitp_gradient,
                backward=backward,
                module=self._bad_module(norms),
                num_skipped=self.metrics.num_skipped,
            )
        )
        reason = describe(findings, gradient=gradient, limit=limit, num_loss_shares=self.num_loss_shares)
        num_skipped, most = max(finding.num_skipped for finding in findings), self.settings.max_skipped_steps
        if num_skipped >= most:
            before = f"; {num_skipped} skipped before, [bad_steps] max_skipped_steps = {most}"
            self._stop(step, reason + (before if num_skipped else ""))
        self.metrics.log_skipped(step, f"step {step} skipped ({num_skipped + 1} of {most}): {reason}")
        self._forget_routing()
        raise StepSkipped

    def _forget_routing(self) -> None:
        """Load balancing counts tokens until the optimizer's step, which does not come."""
        for part in self.model_parts:
            for name, buffer in part.named_buffers():
                if name.endswith("tokens_per_expert_E"):
                    buffer.zero_()

    @torch.no_grad()
    def check_weights(self, step: int, dtype: torch.dtype | None) -> None:
        """Look at the weights themselves, before a checkpoint is written.

        Args:
            dtype: in which they are written; None for their own.

        Raises:
            UserError: naming a weight that is not finite.
        """
        norms = _norms([local(p).to(dtype or p.dtype) for p in self._all()]).to(self.device)
        bad = (~norms.isfinite()).any().float()
        if dist.get_world_size() > 1:
            dist.all_reduce(bad)
        if bad.item():
            name, norm = _nearest(self._gather(Finding(module=self._bad_module(norms.tolist()))))
            written = "" if dtype is None else f", written as {dtype} ([checkpoint] export_dtype)"
            self._stop(step, f"the weight of {name} is {norm} after the update{written}")

    def _bad_module(self, norms: list[float]) -> BadModule | None:
        bad = {name: norm for name, norm in zip(self.parameters, norms) if not math.isfinite(norm)}
        if not bad:
            return None
        modules = list(dict.fromkeys(map(_module, self.parameters)))
        place = max(modules.index(_module(name)) for name in bad)
        norms_there = {name: norm for name, norm in bad.items() if _module(name) == modules[place]}
        return BadModule((self.stage, place), modules[place], norms_there)

    def _gather(self, finding: Finding) -> list[Finding]:
        findings = [finding] * dist.get_world_size()
        dist.all_gather_object(findings, finding)
        return findings

    def _stop(self, step: int, reason: str) -> NoReturn:
        checkpoint = self.last_checkpoint()
        kept = f"The last checkpoint, {checkpoint}, is from before." if checkpoint else "There is no checkpoint yet."
        raise UserError(f"step {step}: {reason}. Training has stopped. {kept}")


def _norms(tensors: list[Tensor]) -> Tensor:
    """Norm of each tensor, float32."""
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float32))


def _share(parameter: nn.Parameter) -> float:
    """Weight of a local square in the sum over ranks, where replicated numbers appear several times."""
    if not isinstance(parameter, DTensor):
        return 1.0
    sizes = zip(parameter.device_mesh.shape, parameter.placements)
    return 1.0 / math.prod(size for size, placement in sizes if placement.is_replicate())


def _module(parameter: str) -> str:
    """``layers.3`` of ``layers.3.attention.wq.weight``, ``norm`` of ``norm.weight``."""
    parts = parameter.split(".")
    return ".".join(parts[:2] if parts[0] == "layers" else parts[:1])


def _nearest(findings: list[Finding]) -> tuple[str, float] | None:
    """The bad module nearest to the loss, or its only bad tensor, and what it holds."""
    modules = [finding.module for finding in findings if finding.module is not None]
    if not modules:
        return None
    place, name, _ = max(modules, key=lambda module: module.place)
    norms: dict[str, float] = {}
    for module in modules:
        if module.place == place:
            norms |= module.norms
    worst = math.nan if any(map(math.isnan, norms.values())) else math.inf
    return (next(iter(norms)) if len(norms) == 1 else name), worst


def describe(findings: list[Finding], *, gradient: float, limit: float, num_loss_shares: int) -> str:
    """Why a step is bad, in words.

    Args:
        findings: of all ranks, in their order.
        gradient: its global norm.
        limit: `[bad_steps] skip_above`; infinity for none.
        num_loss_shares: as in `BadSteps`.
    """
    if math.isfinite(gradient) and gradient > limit:
        return f"gradient norm {gradient:.1f} above {limit:g}"
    parts = {name: [finding.losses.get(name, 0.0) for finding in findings] for name in ("ntp", "nitp")}
    repeats = sum(bool(finding.losses) for finding in findings) / num_loss_shares
    bad, fine = [], []
    for name, losses in parts.items():
        if ranks := [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]:
            bad.append(f"the {name} loss of {_rank_list(ranks)} is {losses[ranks[0]]}")
        elif any(name in finding.losses for finding in findings):
            fine.append(f"{name} {sum(losses) / repeats:.4g}")
    if bad:
        return " and ".join(bad) + (f" ({', '.join(fine)})" if fine else "")
    return f"{_describe_gradient(findings, gradient)} (the losses are finite: {', '.join(fine)})"


def _describe_gradient(findings: list[Finding], gradient: float) -> str:
    if ranks := [rank for rank, finding in enumerate(findings) if not math.isfinite(finding.nitp_gradient)]:
        return f"the gradient of the nitp loss of {_rank_list(ranks)} is {findings[ranks[0]].nitp_gradient}"
    nearest = _nearest(findings)
    if nearest is None:
        return f"the global gradient norm is {gradient}"
    name, norm = nearest
    part = _PARTS.get(_module(name), "")
    ranks = [rank for rank, finding in enumerate(findings) if not math.isfinite(finding.backward)]
    if not ranks and len(findings) == 1:
        ranks = [0]
    source = f" in the backward pass of {_rank_list(ranks)}" if ranks else ", summed over ranks"
    return f"the {part}gradient of {name} is {norm}{source}"


def _rank_list(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
