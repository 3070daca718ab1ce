"""The `[model]` table."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model a recipe names. Kept beside the built ``model_spec`` so that it can be written back."""

    family: str = ""
    """Registered family, for example ``llama3``."""

    flavor: str = ""
    """Size within the family."""

    attn_backend: Literal["flex", "varlen"] = "flex"
    """Attention kernels."""

    moe_comm_backend: Literal["standard", "deepep", "hybridep", "minimal_async_ep"] | None = None
    """Token dispatcher of a family with experts; None takes the family's, the all-to-all ``standard``."""
