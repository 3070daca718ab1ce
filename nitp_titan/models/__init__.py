"""Registered model families. A family is imported when a recipe names it."""

import inspect
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from nitp_titan.errors import nearest_choice, UserError
from nitp_titan.models.settings import ModelConfig

# Folders beside this file.
FAMILIES = ("llama3", "moe", "qwen3", "deepseek_v3", "gpt_oss")


def build_model_spec(model: ModelConfig):
    """The TorchTitan ``ModelSpec`` (without NITP) that `[model]` names.

    Raises:
        UserError: for an unknown family or flavor, naming the nearest one, or a token
            dispatcher for a model without experts.
    """
    family = _import_family(model.family)
    if model.flavor not in family.FLAVORS:
        raise UserError(
            f"[model] flavor = '{model.flavor}' is unknown in {model.family}."
            f"{nearest_choice(model.flavor, list(family.FLAVORS))}",
            table="model",
            key="flavor",
        )
    backends = {"attn_backend": model.attn_backend}
    takes_dispatcher = "moe_comm_backend" in inspect.signature(family.model_registry).parameters
    if model.moe_comm_backend is not None and takes_dispatcher:
        backends["moe_comm_backend"] = model.moe_comm_backend
    spec = family.model_registry(model.flavor, **backends)
    has_experts = any(getattr(layer, "moe", None) is not None for layer in spec.model.layers)
    if model.moe_comm_backend is not None and not (takes_dispatcher and has_experts):
        raise UserError(
            f"[model] moe_comm_backend = '{model.moe_comm_backend}', but {model.family} {model.flavor} has no experts.",
            table="model",
            key="moe_comm_backend",
        )
    return spec


def meta_tensors(spec):
    """Tensors of a ``ModelSpec``'s whole model by name, on the meta device: sizes and types without contents."""
    with torch.device("meta"):
        return spec.model.build().state_dict()


def hf_config(model: ModelConfig, spec) -> dict[str, Any]:
    """``config.json`` of the transformers class that computes the same as a model, without what its run knows.

    Args:
        spec: the ``ModelSpec`` that `build_model_spec` makes of ``model``.

    Raises:
        UserError: with the reason, if there is no such class.
    """
    family = _import_family(model.family)
    if not hasattr(family, "hf_config") or spec.state_dict_adapter is None:
        missing = "hf_config" if not hasattr(family, "hf_config") else "state_dict_adapter"
        raise UserError(
            f"[model] family = '{model.family}' has no {missing}, which says what it is in transformers "
            "(nitp_titan/README.md).",
            table="model",
            key="family",
        )
    return family.hf_config(spec.model)


def _import_family(name: str) -> ModuleType:
    """The module of a registered family, or of one outside this project by its import path."""
    if name in FAMILIES:
        return import_module(f"{__name__}.{name}")
    try:
        found = name and find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        near = nearest_choice(name, FAMILIES)
        raise UserError(
            f"[model] family = '{name}' is neither registered nor an importable module.{near}",
            table="model",
            key="family",
        )
    module = import_module(name)
    missing = [attribute for attribute in ("FLAVORS", "model_registry") if not hasattr(module, attribute)]
    if missing:
        raise UserError(
            f"[model] family = '{name}': the module has no {' and no '.join(missing)}; a family has both "
            "(nitp_titan/README.md).",
            table="model",
            key="family",
        )
    return module
