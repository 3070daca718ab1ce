"""Registered model families. A family is imported when a recipe names it."""

import inspect
from importlib import import_module

from nitp_titan.config import ModelConfig, nearest, UserError

FAMILIES = {"llama3": "nitp_titan.models.llama3", "moe": "nitp_titan.models.moe"}


def build_model_spec(model: ModelConfig):
    """The TorchTitan ``ModelSpec`` (without NITP) that `[model]` names.

    Raises:
        UserError: for an unknown family or flavor, naming the nearest one, or a token
            dispatcher for a family without experts.
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
    backends = {"attn_backend": model.attn_backend}
    if model.moe_comm_backend is not None:
        if "moe_comm_backend" not in inspect.signature(family.model_registry).parameters:
            raise UserError(
                f"[model] moe_comm_backend = '{model.moe_comm_backend}', but {model.family} has no experts.",
                table="model",
                key="moe_comm_backend",
            )
        backends["moe_comm_backend"] = model.moe_comm_backend
    return family.model_registry(model.flavor, **backends)
