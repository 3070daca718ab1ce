"""Folders of checkpoints, ``step-N``: complete once the file that is written last is there. Imports no torch."""

import re
from collections.abc import Sequence
from pathlib import Path

METADATA = ".metadata"
"""Written last by DCP."""

INDEX = "model.safetensors.index.json"
"""Written last where the last step is saved as safetensors (``last_save_in_hf``)."""


def step_folders(folder: Path) -> dict[int, Path]:
    """Folders of all steps in the order of their steps, complete or not; empty if there is no such folder."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return dict(sorted((int(path.name.removeprefix("step-")), path) for path in found))


def complete_steps(folder: Path, last: Sequence[str] = (METADATA, INDEX)) -> dict[int, Path]:
    """Folders of complete checkpoints: those that hold one of the files that are written last."""
    return {step: path for step, path in step_folders(folder).items() if any((path / name).is_file() for name in last)}


def unfinished_steps(folder: Path) -> list[Path]:
    """Folders of checkpoints that were not written to their end."""
    return [path for step, path in step_folders(folder).items() if step not in complete_steps(folder)]
