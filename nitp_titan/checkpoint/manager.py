"""TorchTitan's checkpoints, whole or none: one that is half-written or half-deleted does not count."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import LR_SCHEDULER, MODEL, OPTIMIZER, purge_thread
from torchtitan.tools.filesystem import is_remote
from torchtitan.tools.logging import logger

from nitp_titan.checkpoint import optimizer_states, safe_dcp
from nitp_titan.checkpoint.steps import (
    complete_steps,
    METADATA,
    step_folders,
    unfinished_steps,
)
from nitp_titan.errors import UserError


class NITPCheckpointManager(CheckpointManager):
    """TorchTitan's checkpoints; an initial checkpoint may lack the projector, which then stays as initialised."""

    before_save: Callable[[int, torch.dtype | None], None] | None = None
    """Called before anything is written, with the step and the type that weights are cast to, None without a cast;
    raises if the states are not fit to be kept."""

    after_save: Callable[[int], None] | None = None
    """Called with the step once its checkpoint is whole."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        def __post_init__(self) -> None:
            if self.initial_load_path and not is_remote(self.initial_load_path):
                # TorchTitan takes absolute paths only.
                self.initial_load_path = os.path.abspath(self.initial_load_path.strip())
            model_only = self.initial_load_model_only
            if not self.initial_load_path and not self.initial_load_in_hf:
                # TorchTitan warns of its own default.
                self.initial_load_model_only = False
            CheckpointManager.Config.__post_init__(self)
            self.initial_load_model_only = model_only

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__(config, **kwargs)
        self._saved_step: int | None = None
        """Step of the states in the newest checkpoint, which need not be saved again."""
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
                for folder in unfinished_steps(Path(self.folder)):
                    logger.warning(f"{folder} was not written to its end and is removed.")
                    shutil.rmtree(folder)
            dist.barrier()
        step = self._find_load_step() if step == -1 else step
        loaded = super()._load(step)
        self._saved_step = None if step == -1 else step
        return loaded

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        return curr_step != self._saved_step and super()._should_save(curr_step, last_step)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if self.before_save is not None and self._should_save(curr_step, last_step):
            exports = last_step and self.last_save_model_only
            self.before_save(curr_step, self.export_dtype if exports else None)
        saved = super()._save(curr_step, last_step)
        if saved:
            self._saved_step = curr_step
            if self.save_future is None:
                self._tell_saved()
        return saved

    def _tell_saved(self) -> None:
        if self.after_save is not None:
            self.after_save(self._saved_step)

    def last_checkpoint(self) -> str | None:
        """Path of the latest checkpoint that is whole, once the one that is being written is; None if there is none."""
        if not self.enable:
            return None
        self.maybe_wait_for_saving()
        step = self._find_load_step()
        return None if step < 0 else self._create_checkpoint_id(step)

    def save_now(self, step: int) -> None:
        """Save a step whatever the interval, if it is not saved yet, and wait for it."""
        if not self.enable or self.load_only:
            return
        interval, self.interval = self.interval, 1
        self.save(step)
        self.interval = interval
        self.maybe_wait_for_saving()

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any):
        """As `CheckpointManager.dcp_save`; a step that is written again does not count as a checkpoint meanwhile.

        Raises:
            UserError: if the disk is full, or cannot be written for another reason.
        """
        with _one_line(checkpoint_id):
            if not is_remote(checkpoint_id):
                if dist.get_rank() == 0:
                    _invalidate(Path(checkpoint_id))
                    # Made in the background, it might count among `keep_latest_k` or not yet.
                    Path(checkpoint_id).mkdir(parents=True, exist_ok=True)
                dist.barrier()
            return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)

    def _find_load_step(self, folder: str = "") -> int:
        """As upstream, which takes a renamed copy, such as ``step-20-best``, for the step itself."""
        folder = folder or self.folder
        return super()._find_load_step(folder) if is_remote(folder) else max(complete_steps(Path(folder)), default=-1)

    def _purge_stale_checkpoints(self) -> None:
        """As upstream, which deletes renamed copies too."""
        if is_remote(self.folder):
            return super()._purge_stale_checkpoints()
        if self._should_purge():
            for path in list(step_folders(Path(self.folder)).values())[: -self.keep_latest_k]:
                self.purge_queue.put(str(path))

    def _wait_for_saving(self) -> None:
        with _one_line(self.folder):
            super()._wait_for_saving()
        self._tell_saved()

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """As `CheckpointManager.dcp_load`, through `safe_dcp`. Optimizers get their states from the checkpoint, and
        keep their settings: what a run records is what it trains, from its first step on.

        Of an initial checkpoint parts may be missing; `check_initial_load` has seen to it that only the projector is.
        """
        if from_hf:
            return super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        reader = safe_dcp.reader(checkpoint_id)
        if dist.get_rank() == 0:
            # Once for all ranks: a large checkpoint has as many files as ranks.
            reader.check_files()
        initial = checkpoint_id == self.initial_load_path
        settings = optimizer_states.settings(self.states[OPTIMIZER])
        safe_dcp.load(state_dict, reader, allow_partial=initial)
        self.states[MODEL].load_state_dict(state_dict)
        optimizer_states.restore_settings(self.states[OPTIMIZER], settings, self.states[LR_SCHEDULER])


def _invalidate(step: Path) -> None:
    (step / METADATA).unlink(missing_ok=True)


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
