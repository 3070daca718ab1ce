"""The one place where training-only weights leave a model (App. H)."""

from functools import cache
from typing import Any

from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

TRAINING_PREFIX = "nitp."
"""Of the names of weights that are for training only."""


@cache
def without_training_weights(adapter: type[BaseStateDictAdapter]) -> type[BaseStateDictAdapter]:
    """Subclass a family's adapter so that the objective's module has no Hugging Face counterpart."""

    class WithoutTrainingWeights(adapter):
        def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            backbone = {name: value for name, value in state_dict.items() if not name.startswith(TRAINING_PREFIX)}
            return super().to_hf(backbone)

    WithoutTrainingWeights.__name__ = f"{adapter.__name__}WithoutTrainingWeights"
    return WithoutTrainingWeights
