"""Our own sections that belong to no room of the method. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True, slots=True)
class Float8Config:
    """Float8 training of the linear layers through torchao (TorchTitan's Float8LinearConverter)."""

    enable: bool = False
    """Convert the linear layers to float8."""

    recipe_name: Literal["rowwise", "rowwise_with_gw_hp"] = "rowwise"
    """Scaling recipe."""

    filter_fqns: list[str] = dataclasses.field(default_factory=lambda: ["lm_head"])
    """Modules that keep their type; ``nitp.projector`` keeps the projector out of float8."""

    emulate: bool = False
    """Emulate float8 where the hardware lacks it (CPU, eager only)."""


@dataclass(kw_only=True, slots=True)
class MachineConfig:
    """The machine of a train config. Training does not read it; `scripts/recipe.py check` does."""

    num_ranks: int = 1
    """Ranks (GPUs) in all."""

    device: str = "CPU"
    """Name of the device, for its peak FLOPs in TorchTitan's table."""

    device_memory_gib: float | None = None
    """Memory of one device in GiB; None checks nothing."""

    intended_recipes: list[str] = dataclasses.field(default_factory=list)
    """Recipes that it is meant for, as patterns: ``dense/*``."""
