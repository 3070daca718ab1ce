"""Registered model families. A family is imported when a recipe names it."""

from importlib import import_module

from nitp_titan.config import ModelConfig, nearest, UserError

FAMILIES = {"llama3": "nitp_titan.models.llama3"}


def build_model_spec(model: ModelConfig):
    """The TorchTitan ``ModelSpec`` (without NITP) that `[model]` names.

    Raises:
        UserError: for an unknown family or flavor, naming the nearest one.
    """
    if model.family not in FAMILIES:
        raise UserError(
            f"[model] family = '{model.family}' is not registered.{nearest(model.family, list(FAMILIES))}",
            table="model",
            key="family",
        )
    family = import_module(FAMILIES[model.family])
    if model.flavor not in family.FLAVORS:
        raise UserError(
            f"[model] flavor = '{model.flavor}' is unknown in {model.family}."
            f"{nearest(model.flavor, list(family.FLAVORS))}",
            table="model",
            key="flavor",
        )
    return family.model_registry(model.flavor, attn_backend=model.attn_backend)
