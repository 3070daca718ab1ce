"""The model that TorchTitan will build of a config: its modules replaced by those of `[override]`."""

import copy
import dataclasses
import logging

from torchtitan.config.override import _REGISTRY, apply_overrides
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger

from nitp_titan.errors import nearest, UserError


def overridden(config, spec: ModelSpec) -> ModelSpec:
    """A copy of the model with the overrides of a ``Trainer.Config``, as `Trainer` applies them when it is built.

    Args:
        spec: the model to be trained, its projector included.

    Raises:
        UserError: for an override that is not there, or does not fit.
    """
    if not config.override.imports:
        return spec
    # Overrides reach every part of a config, and replace it in place.
    config = copy.deepcopy(dataclasses.replace(config, model_spec=spec))
    config.model_spec.model.update_from_config(config=config)
    # TorchTitan lists them when it applies them.
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        apply_overrides(config.override, config)
    except (ImportError, ValueError, TypeError) as error:
        imports = config.override.imports
        known = [name for name in _REGISTRY if name.startswith("nitp_titan.")]
        wrong = next((entry for entry in imports if isinstance(entry, str) and entry not in _REGISTRY), "")
        suggestion = nearest(wrong, known) if wrong else ""
        suggestion = suggestion if "Did you mean" in suggestion else ""
        raise UserError(f"[override] imports: {error}{suggestion}", table="override", key="imports") from None
    finally:
        logger.setLevel(level)
    return config.model_spec
