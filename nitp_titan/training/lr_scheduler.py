"""Learning-rate schedule: TorchTitan's warmup-stable-decay, with the exponential decay that it lacks."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torchtitan.components.optimizer import LRSchedulersContainer

from nitp_titan.errors import UserError


class WSDSchedulers(LRSchedulersContainer):
    """Linear warm-up, stable phase, decay; ``decay_type = "exponential"`` is WSD-exp (paper App. C)."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        """As TorchTitan's. An exponential decay goes down to ``min_lr_factor``, which must be above 0."""

        decay_type: Literal["linear", "sqrt", "cosine", "exponential"] = "linear"

        def __post_init__(self) -> None:
            if self.decay_type == "exponential" and not self.min_lr_factor > 0:
                raise UserError(
                    f"[lr_scheduler] min_lr_factor = {self.min_lr_factor!r}, but an exponential decay never reaches "
                    "0; choose its end above 0, for example 0.1.",
                    table="lr_scheduler",
                    key="min_lr_factor",
                )

        def build(self, *, optimizers, training_steps: int) -> LRSchedulersContainer:
            """Schedulers of all optimizers; every type but ``exponential`` is TorchTitan's own."""
            build = LRSchedulersContainer.Config.build
            if self.decay_type != "exponential":
                return build(self, optimizers=optimizers, training_steps=training_steps)
            to_zero = dataclasses.replace(self, decay_type="linear", min_lr_factor=0.0)
            linear = build(to_zero, optimizers=optimizers, training_steps=training_steps)
            factor = partial(
                exponential_decay,
                linear=linear.schedulers[0].lr_lambdas[0],
                warmup_steps=self.warmup_steps,
                min_lr_factor=self.min_lr_factor,
            )
            return LRSchedulersContainer(optimizers, factor)


def exponential_decay(step: int, *, linear: Callable[[int], float], warmup_steps: int, min_lr_factor: float) -> float:
    """Factor of the learning rate at a step, counted from 0.

    Args:
        linear: TorchTitan's factor of the same schedule, decaying linearly to 0; one minus it
            is the progress of the decay, p in [0, 1].
        min_lr_factor: factor at the end of the decay.

    Returns:
        ``min_lr_factor ** p`` after the warm-up: 1 while stable, then straight on a log scale.
    """
    factor = linear(step)
    return factor if step < warmup_steps else min_lr_factor ** (1 - factor)
