"""Start a run from another model: a checkpoint without projector, or a Hugging Face model.

Tensors to load, new tensors and those that do not fit are known before anything is built.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open, SafetensorError
from torch import Tensor
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger

from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.errors import nearest_choice, UserError
from nitp_titan.models import hf_config
from nitp_titan.models.hf_defaults import completed
from nitp_titan.objectives.export import TRAINING_PREFIX

# Of a Hugging Face model, what a model here computes by itself.
_COMPUTED = ("rotary_emb.inv_freq",)
# Settings of a config.json that say nothing of what a model computes, or are compared in another way.
_NOT_COMPARED = ("architectures", "rope_theta", "rope_parameters", "rope_scaling")


def check_initial_load(config, spec: ModelSpec, tensors: dict[str, Tensor]):
    """Check the initial checkpoint of a ``Trainer.Config`` and log what will be loaded and what is new.

    For runs without checkpoints of their own: TorchTitan resumes from these first.

    Args:
        spec: the model to be trained, its projector included.
        tensors: of the model, as `meta_tensors` gives them.

    Returns:
        The config; where ``initial_load_path`` named a whole run it names its latest step.

    Raises:
        UserError: naming the path and what does not fit, if the checkpoint is of another model.
    """
    settings = config.checkpoint
    # Without a path TorchTitan loads the model from the tokenizer's folder.
    path = settings.initial_load_path or (config.hf_assets_path if settings.initial_load_in_hf else None)
    if not settings.enable or not path:
        return config
    try:
        if not settings.initial_load_in_hf:
            checkpoint = Checkpoint(path)
            logger.info(_check_native(checkpoint, config, tensors))
            return replace(config, checkpoint=replace(settings, initial_load_path=str(checkpoint.folder)))
        if not settings.initial_load_in_hf_quantized:
            logger.info(_check_hf(Path(path), hf_config(config.model, spec), spec, tensors))
        return config
    except UserError as error:
        reason = f"[checkpoint] initial_load_path: {error}"
        raise UserError(reason, table="checkpoint", key="initial_load_path") from None


def _message(source: Path, loaded: int, states: str, new: Sequence[str], unused: Sequence[str] = ()) -> str:
    parts = [f"Starting from {source}: {loaded} tensors of the model, {states}"]
    parts += [f"new, as initialised: {', '.join(new)}"] if new else []
    parts += [f"not used: {', '.join(unused)}"] if unused else []
    return "; ".join(parts)


def _check_native(checkpoint: Checkpoint, config, tensors: dict[str, Tensor]) -> str:
    projector = [name for name in tensors if name.startswith(TRAINING_PREFIX)]
    new = [] if any(name in checkpoint.tensors for name in projector) else projector
    checkpoint.check_model({name: tensor for name, tensor in tensors.items() if name not in new})
    unused = [name for name in checkpoint.tensors if name not in tensors]
    states = "without optimizer state (initial_load_model_only = true)"
    if not config.checkpoint.initial_load_model_only:
        if not checkpoint.has_optimizer:
            raise UserError(f"{checkpoint.folder} holds a model only; set initial_load_model_only = true.")
        if checkpoint.step >= config.training.steps:
            raise UserError(
                f"{checkpoint.folder} has done {checkpoint.step} steps and [training] steps = {config.training.steps}: "
                "there is nothing left to train."
            )
        states = "with the states of optimizer, schedule and data"
    return _message(checkpoint.folder, len(tensors) - len(new), states, new, unused)


def _check_hf(folder: Path, settings: dict[str, Any], spec: ModelSpec, tensors: dict[str, Tensor]) -> str:
    """Compare a Hugging Face model with the ``config.json`` and the tensors that the recipe's model would have."""
    theirs = _read_config(folder)
    _check_settings(folder, settings, theirs)
    adapter = spec.state_dict_adapter(spec.model, None)
    wanted = adapter.to_hf(dict(tensors))
    found = _safetensors_shapes(folder)
    for name, tensor in wanted.items():
        if name not in found:
            tied = " (its embeddings are tied, those of the recipe's model are not)" if name == "lm_head.weight" else ""
            raise UserError(f"{folder} has no tensor '{name}', which the recipe's model needs{tied}.")
        if found[name] != list(tensor.shape):
            raise UserError(f"{folder}: '{name}' is {found[name]}, but the recipe's model needs {list(tensor.shape)}.")
    # A tied unembedding may be stored a second time.
    known = {"lm_head.weight"} if theirs.get("tie_word_embeddings") else set()
    unused = [name for name in found if name not in wanted and name not in known and not name.endswith(_COMPUTED)]
    if unused:
        raise UserError(f"{folder} has a tensor '{unused[0]}', for which the recipe's model has no place.")
    filled = adapter.from_hf(wanted)
    new = [name for name in tensors if name not in filled]
    return _message(folder, len(filled), "without optimizer state", new)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        siblings = [str(other) for other in folder.parent.glob("*")] if folder.parent.is_dir() else []
        raise UserError(f"{folder} is not a folder.{nearest_choice(str(folder), siblings)}")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no object")
        return settings
    except OSError:
        raise UserError(f"{folder} holds no config.json, which says what model it is.") from None
    except ValueError as error:
        raise UserError(f"{folder}/config.json is not JSON: {error}") from None


def _check_settings(folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise UserError unless two configurations agree wherever both say something, the class of theirs included."""
    their_words, theirs = theirs, completed(theirs)
    pairs = {key: (value, theirs.get(key), key in their_words) for key, value in ours.items()}
    pairs = {key: pair for key, pair in pairs.items() if key not in _NOT_COMPARED}
    rope = theirs["rope_parameters"]
    written = {*their_words, *(their_words.get("rope_parameters") or their_words.get("rope_scaling") or {})}
    pairs |= {
        f"rope_parameters {key}": (value, rope.get(key), key in written or key == "rope_type")
        for key, value in completed(ours)["rope_parameters"].items()
    }
    for key, (our, their, is_said) in pairs.items():
        if our is not None and their is not None and our != their:
            default = "" if is_said else f" (not set: the default of '{theirs['model_type']}')"
            raise UserError(f"{folder}/config.json: {key} = {their!r}{default}, but the recipe's model has {our!r}.")


def _safetensors_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors in the safetensors of a folder, from their headers alone."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no safetensors; other formats can run code and are not loaded.")
    shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                shapes |= {name: tensors.get_slice(name).get_shape() for name in names}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}.") from None
    return shapes
