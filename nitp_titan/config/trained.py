"""A config as it is trained: model with objective, float8 and overrides; loss; validation data."""

import copy
import dataclasses
import logging

from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.quantization import Float8LinearConverter
from torchtitan.config.override import _REGISTRY, apply_overrides
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from nitp_titan.config.schedules import splits_backward
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.errors import did_you_mean, UserError
from nitp_titan.objectives.loss import with_objective_loss
from nitp_titan.objectives.variant import with_nitp


def trained(config: Trainer.Config) -> Trainer.Config:
    """The config as the trainer builds it, of a ``NITPTrainer.Config`` that names model and loss without an objective.

    Raises:
        UserError: if model, objective and float8 do not fit each other.
    """
    return dataclasses.replace(
        config, model_spec=_model_spec(config), loss=_loss(config), validator=validation_config(config)
    )


def _model_spec(config: Trainer.Config) -> ModelSpec:
    """Backbone, the objective's module if there is one, then float8 over both.

    A copy: TorchTitan fills and converters replace configs in place, and a config may be built again.
    """
    spec = dataclasses.replace(config.model_spec, model=copy.deepcopy(config.model_spec.model))
    if config.nitp.enabled or (config.geometry.enable and config.geometry.layers):
        spec = with_nitp(spec, config.nitp)
    if not config.float8.enable:
        return spec
    converter = Float8LinearConverter.Config(
        recipe_name=config.float8.recipe_name,
        filter_fqns=config.float8.filter_fqns,
        emulate=config.float8.emulate,
        model_compile_enabled=config.compile.enable and "model" in config.compile.components,
    )
    try:
        return dataclasses.replace(spec, model=converter.build().convert(spec.model))
    except (ImportError, ValueError) as error:
        # Without torchao, or on a device that lacks float8.
        raise UserError(f"[float8] enable = true: {error}", table="float8", key="enable") from None


def _loss(config: Trainer.Config):
    if not isinstance(config.loss, ChunkedLossWrapper.Config):
        return config.loss
    return with_objective_loss(
        config.loss,
        config.nitp,
        observed=config.geometry.enable,
        splits_backward=splits_backward(config.parallelism),
    )


def validation_config(config: Trainer.Config):
    """Validation reads its text in as many streams as training, unless it says otherwise."""
    data = config.validator.dataloader
    if not isinstance(data, TextDataLoader.Config) or data.num_streams is not None:
        return config.validator
    num_streams = getattr(config.dataloader, "num_streams", None)
    return dataclasses.replace(config.validator, dataloader=dataclasses.replace(data, num_streams=num_streams))


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
        near = did_you_mean(wrong, known) if wrong else ""
        raise UserError(f"[override] imports: {error}{near}", table="override", key="imports") from None
    finally:
        logger.setLevel(level)
    return config.model_spec
