"""State-dict adapters without the projector: the one place where training-only weights leave."""

from functools import cache
from typing import Any

from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

PROJECTOR_PREFIX = "nitp."


@cache
def without_projector(adapter: type[BaseStateDictAdapter]) -> type[BaseStateDictAdapter]:
    """Subclass a family's adapter so that the projector has no Hugging Face counterpart."""

    class WithoutProjector(adapter):
        def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            backbone = {name: value for name, value in state_dict.items() if not name.startswith(PROJECTOR_PREFIX)}
            return super().to_hf(backbone)

    WithoutProjector.__name__ = f"{adapter.__name__}WithoutProjector"
    return WithoutProjector
