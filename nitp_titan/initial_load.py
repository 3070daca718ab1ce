"""Start a run from another model: a checkpoint without projector, or a Hugging Face model.

What is loaded, what is new and what does not fit is known before anything is built.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open, SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import LR_SCHEDULER, MODEL, OPTIMIZER, purge_thread
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.filesystem import is_remote
from torchtitan.tools.logging import logger

from nitp_titan import dcp_files
from nitp_titan.checkpoint import Checkpoint
from nitp_titan.config import nearest, UserError
from nitp_titan.hf.adapter import PROJECTOR_PREFIX
from nitp_titan.hf.export import meta_tensors
from nitp_titan.models import hf_config

# Of a Hugging Face model, what a model here computes by itself.
_COMPUTED = ("rotary_emb.inv_freq",)
# Settings of a config.json that say nothing of what a model computes, or are compared in another way.
_NOT_COMPARED = ("architectures", "rope_theta", "rope_parameters", "rope_scaling")


class NITPCheckpointManager(CheckpointManager):
    """TorchTitan's checkpoints; an initial checkpoint may lack the projector, which then stays as initialised."""

    before_save: Callable[[int], None] | None = None
    """Called with the step before anything is written; raises if the states are not fit to be kept."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        def __post_init__(self) -> None:
            if self.initial_load_path and not is_remote(self.initial_load_path):
                # TorchTitan takes absolute paths only.
                self.initial_load_path = os.path.abspath(self.initial_load_path.strip())
            CheckpointManager.Config.__post_init__(self)

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__(config, **kwargs)
        self._saved_step: int | None = None
        if not config.enable or is_remote(self.folder):
            return
        if self.purge_thread is not None:
            # The same thread with our way to delete.
            self.purge_queue.put(None)
            self.purge_thread.join()
            arguments = (self.purge_queue, _remove_checkpoint)
            self.purge_thread = threading.Thread(target=purge_thread, args=arguments, daemon=True)
            self.purge_thread.start()

    def _load(self, step: int = -1) -> bool:
        if not self.load_only and not is_remote(self.folder):
            # What was not written to its end would count as one of `keep_latest_k`, and its files stay behind when
            # fewer ranks write the step again.
            if dist.get_rank() == 0:
                for folder in unfinished(Path(self.folder)):
                    logger.warning(f"{folder} was not written to its end and is removed.")
                    shutil.rmtree(folder)
            dist.barrier()
        return super()._load(step)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if self.before_save is not None and self._should_save(curr_step, last_step):
            self.before_save(curr_step)
        saved = super()._save(curr_step, last_step)
        if saved:
            self._saved_step = curr_step
        return saved

    def last_checkpoint(self) -> str | None:
        """Path of the latest checkpoint that is whole, once the one that is being written is; None if there is none."""
        if not self.enable:
            return None
        self.maybe_wait_for_saving()
        step = self._find_load_step()
        return None if step < 0 else self._create_checkpoint_id(step)

    def save_now(self, step: int) -> None:
        """Save a step whatever the interval, if it is not saved yet, and wait for it."""
        if not self.enable or self.load_only or step == self._saved_step:
            return
        interval, self.interval = self.interval, 1
        self.save(step)
        self.interval = interval
        self.maybe_wait_for_saving()

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any):
        """As `CheckpointManager.dcp_save`; a step that is written again is no checkpoint meanwhile.

        Raises:
            UserError: if the disk is full, or cannot be written for another reason.
        """
        if not is_remote(checkpoint_id):
            if dist.get_rank() == 0:
                _invalidate(Path(checkpoint_id))
            dist.barrier()
        with _one_line(checkpoint_id):
            return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)

    def _wait_for_saving(self) -> None:
        with _one_line(self.folder):
            super()._wait_for_saving()

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """As `CheckpointManager.dcp_load`, through `dcp_files`.

        Of an initial checkpoint parts may be missing; `check_initial_load` has seen to it that only the projector is.
        """
        if from_hf:
            return super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        reader = dcp_files.reader(checkpoint_id)
        reader.check_files()
        initial = checkpoint_id == self.initial_load_path and not is_remote(checkpoint_id)
        settings = [_settings(optimizer) for optimizer in self.states[OPTIMIZER]]
        dcp_files.load(state_dict, reader, allow_partial=initial)
        self.states[MODEL].load_state_dict(state_dict)
        if not initial:
            return
        if OPTIMIZER in state_dict:
            # Betas, weight decay and the like are the recipe's; the checkpoint gives the states.
            for optimizer, groups in zip(self.states[OPTIMIZER], settings):
                for group, wanted in zip(optimizer.param_groups, groups):
                    group.update(wanted)
            saved = reader.metadata.state_dict_metadata
            _start_afresh(self.states[OPTIMIZER], [name for name in saved if name.startswith(f"{OPTIMIZER}.state.")])
        if LR_SCHEDULER in state_dict:
            # The recipe's learning rate at the checkpoint's step.
            for scheduler in self.states[LR_SCHEDULER].schedulers:
                for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr()):
                    group["lr"] = lr


def unfinished(folder: Path) -> list[Path]:
    """Folders of steps that were not written to their end: DCP's metadata and the index of safetensors come last."""
    last = (".metadata", "model.safetensors.index.json")
    steps = sorted(folder.glob("step-*"))
    return [step for step in steps if step.is_dir() and not any((step / name).is_file() for name in last)]


def _invalidate(step: Path) -> None:
    (step / ".metadata").unlink(missing_ok=True)


def _remove_checkpoint(step: str) -> None:
    """Delete a checkpoint, whose files may go in any order, so that no part of it counts as one."""
    _invalidate(Path(step))
    shutil.rmtree(step)


@contextmanager
def _one_line(place: str) -> Iterator[None]:
    """A failed write as one line with its reason."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
        rank, (reason, _) = next(iter(failures.items()))
        raise UserError(
            f"{place} could not be written by rank {rank}: {reason}. Earlier checkpoints are whole."
        ) from error


def _settings(optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _start_afresh(optimizers, saved: Sequence[str]) -> None:
    """Reset the optimizer state of parameters that the checkpoint does not have.

    TorchTitan makes room for a state by a step without gradients, which Adam counts.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"]):
                if not any(key.startswith(f"{OPTIMIZER}.state.{name}.") for key in saved):
                    for value in optimizer.state[parameter].values():
                        value.zero_()


def check_initial_load(config, spec: ModelSpec):
    """Check the initial checkpoint of a ``Trainer.Config`` and log what will be loaded and what is new.

    For runs without checkpoints of their own: TorchTitan goes on from these first.

    Args:
        spec: the model to be trained, its projector included.

    Returns:
        The config; where ``initial_load_path`` named a whole run it names its latest step.

    Raises:
        UserError: naming the path and what does not fit, if the checkpoint is of another model.
    """
    settings = config.checkpoint
    # TorchTitan takes the model beside the tokenizer where no path is given.
    path = settings.initial_load_path or (config.hf_assets_path if settings.initial_load_in_hf else None)
    if not settings.enable or not path or is_remote(path):
        return config
    try:
        if not settings.initial_load_in_hf:
            checkpoint = Checkpoint(Path(path))
            logger.info(_check_native(checkpoint, config, meta_tensors(spec)))
            return replace(config, checkpoint=replace(settings, initial_load_path=str(checkpoint.folder)))
        if not settings.initial_load_in_hf_quantized:
            logger.info(_check_hf(Path(path), hf_config(config.model, spec), spec))
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
    projector = [name for name in tensors if name.startswith(PROJECTOR_PREFIX)]
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


def _check_hf(folder: Path, settings: dict[str, Any], spec: ModelSpec) -> str:
    """Compare a Hugging Face model with the ``config.json`` and the tensors that the recipe's model would have."""
    theirs = _read_config(folder)
    _check_settings(folder, settings, theirs)
    adapter = spec.state_dict_adapter(spec.model, None)
    tensors = meta_tensors(spec)
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
        raise UserError(f"{folder} is not a folder.{nearest(str(folder), siblings)}")
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder} holds no config.json, which says what model it is.") from None
    except ValueError as error:
        raise UserError(f"{folder}/config.json is not JSON: {error}") from None


def _check_settings(folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise UserError unless two configurations agree wherever both say something."""
    pairs = {key: (value, theirs.get(key)) for key, value in ours.items() if key not in _NOT_COMPARED}
    our_rope, their_rope = _rope(ours), _rope(theirs)
    pairs |= {f"rope_parameters {key}": (value, their_rope.get(key)) for key, value in our_rope.items()}
    for key, (our, their) in pairs.items():
        if our is not None and their is not None and our != their:
            raise UserError(f"{folder}/config.json: {key} = {their!r}, but the recipe's model has {our!r}.")


def _rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings of a configuration, as transformers 5 writes them."""
    parameters = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    parameters.setdefault("rope_theta", settings.get("rope_theta"))
    return parameters


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
