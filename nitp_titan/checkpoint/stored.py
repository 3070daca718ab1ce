"""A checkpoint of a run (DCP) on disk: where it is, what it holds, and its tensors a few at a time."""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.tools.filesystem import is_remote

from nitp_titan.checkpoint import safe_dcp
from nitp_titan.checkpoint.steps import complete_steps, METADATA
from nitp_titan.errors import nearest_choice, UserError
from nitp_titan.objectives.export import TRAINING_PREFIX

RESOLVED = "resolved.toml"
"""The recipe of a run, in its folder."""

# Entries that a trainer saves beside its model, by the name before the first dot.
_OTHER_STATES = ("optimizer", "lr_scheduler", "dataloader", "train_state")


class Checkpoint:
    """The checkpoint of one step.

    Args:
        path: its folder, the folder of all checkpoints of a run, or the run folder; of several the latest is taken. A
            remote path (``s3://...``) must be its own folder.

    Raises:
        UserError: if there is no complete checkpoint, naming the file that is missing, damaged, too short or could run
            code.
    """

    def __init__(self, path: Path | str):
        self.folder = path if is_remote(path) else _step_folder(Path(path))
        self._reader = safe_dcp.reader(self.folder)
        self._reader.check_files()
        entries = self._reader.metadata.state_dict_metadata
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(tuple(f"{s}." for s in _OTHER_STATES))
        }
        """Size and type of the model's tensors by name, those of the projector included."""
        self.has_optimizer = any(name.startswith("optimizer.state.") for name in entries)
        self.data_state = {name.removeprefix("dataloader.") for name in entries if name.startswith("dataloader.")}
        """Names of the data loader's entries."""

    @cached_property
    def step(self) -> int:
        """Its step: from the name of its folder, from the target of a link, or from the trainer's state in it.

        Raises:
            UserError: if none of them has it, as for a model alone in a folder that was renamed.
        """
        for name in (str(self.folder), "" if is_remote(self.folder) else str(self.folder.resolve())):
            if found := re.search(r"(?:^|/)step-(\d+)/?$", name):
                return int(found[1])
        state = {"train_state": {"step": 0}}
        if "train_state.step" not in self._reader.metadata.state_dict_metadata:
            raise UserError(f"{self.folder} does not say its step: name it step-N.")
        safe_dcp.load(state, self._reader, no_dist=True)
        return int(state["train_state"]["step"])

    @property
    def run_folder(self) -> Path:
        """The nearest folder above that has the run's resolved recipe; UserError without one."""
        for folder in self.folder.resolve().parents:
            if (folder / RESOLVED).is_file():
                return folder
        raise UserError(f"no folder above {self.folder} holds {RESOLVED}, which says what model the checkpoint is of.")

    def check_model(self, tensors: dict[str, Tensor]) -> None:
        """Raise UserError unless the checkpoint holds just these tensors of a model, and perhaps a projector."""
        surplus = [name for name in self.tensors if name not in tensors and not name.startswith(TRAINING_PREFIX)]
        if surplus:
            raise UserError(f"{self.folder} has a tensor '{surplus[0]}', for which the model has no place.")
        for name, tensor in tensors.items():
            if name not in self.tensors:
                raise UserError(f"{self.folder} has no tensor '{name}', which the model needs.")
            if self.tensors[name].size != tensor.size():
                raise UserError(
                    f"{self.folder}: '{name}' is {list(self.tensors[name].size)}, but the model needs "
                    f"{list(tensor.size())}."
                )

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of these names, whole and on the CPU, in the type that they were saved in.

        Raises:
            UserError: if a file of the checkpoint is missing or damaged.
        """
        entries = {name: self.tensors[name] for name in names}
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
        safe_dcp.load(tensors, self._reader, no_dist=True)
        return tensors


def _step_folder(path: Path) -> Path:
    """The folder of one step that a path names."""
    if not path.is_dir():
        siblings = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"{path} is not a folder.{nearest_choice(str(path), siblings)}")
    if (path / METADATA).is_file():
        return path
    if any(path.glob("*.distcp")):
        raise UserError(f"{path} has no {METADATA}: its writing was interrupted. Take an earlier checkpoint.")
    steps = {step: at for folder in (path, *path.glob("*/")) for step, at in complete_steps(folder, [METADATA]).items()}
    if not steps:
        in_hf = any(path.glob("*.safetensors")) or any(path.glob("**/step-*/*.safetensors"))
        reason = " It holds safetensors: a checkpoint saved with last_save_in_hf is exported already." if in_hf else ""
        raise UserError(f"{path} holds no complete checkpoint (a folder step-N with {METADATA}).{reason}")
    return steps[max(steps)]
