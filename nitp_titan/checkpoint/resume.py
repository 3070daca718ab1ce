"""Whether a run can resume from its own checkpoints; asked before anything is built."""

from pathlib import Path

from torch import Tensor
from torchtitan.components.checkpointer.base import DATALOADER
from torchtitan.tools.filesystem import is_remote

from nitp_titan.checkpoint.steps import complete_steps, INDEX, METADATA
from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.errors import UserError


def check_resume(config, tensors: dict[str, Tensor], step: int | None) -> bool:
    """Check the checkpoint that a ``Trainer.Config`` resumes from; nothing is checked where there is none.

    Args:
        tensors: of the model to be trained, its projector included.
        step: of the checkpoint; None if there is none, and then ``load_step`` must not name one.

    Returns:
        Whether all steps are done and training cannot resume from the checkpoint.

    Raises:
        UserError: naming the checkpoint and what does not fit or is damaged.
    """
    settings = config.checkpoint
    step = settings.load_step if step is None else step
    if not settings.enable or step == -1 or is_remote(settings.folder):
        return False
    folder = Path(config.dump_folder) / settings.folder
    complete, exported = complete_steps(folder, [METADATA]), complete_steps(folder, [INDEX])
    done = step >= config.training.steps
    if step not in complete and step in exported:
        if done:
            return True
        raise UserError(
            f"{folder}/step-{step} is a Hugging Face model, as the last step is with [checkpoint] last_save_in_hf = "
            "true: the run has ended. Train on in another dump_folder with [checkpoint] initial_load_path."
        )
    if step not in complete:
        steps = ", ".join(map(str, complete)) or "none"
        raise UserError(
            f"[checkpoint] load_step = {step}: {folder} has no such complete checkpoint; there are: {steps}.",
            table="checkpoint",
            key="load_step",
        )
    checkpoint = Checkpoint(complete[step])
    if step == 0:
        # A seed: TorchTitan loads its model only.
        checkpoint.check_model(tensors)
        return False
    if not checkpoint.has_optimizer:
        if done:
            return True
        raise UserError(
            f"{checkpoint.folder} holds the model only, as the last step does with [checkpoint] last_save_model_only = "
            "true: the run has ended. Train on in another dump_folder with [checkpoint] initial_load_path."
        )
    checkpoint.check_model(tensors)
    if DATALOADER not in settings.exclude_from_loading and isinstance(config.dataloader, TextDataLoader.Config):
        check_data(checkpoint, config.dataloader.num_streams or 1)
    return False


def check_data(checkpoint: Checkpoint, num_streams: int) -> None:
    """Raise UserError unless a checkpoint's data are in so many streams."""
    wanted = {"num_streams", "sequence", *(f"stream_{stream}" for stream in range(num_streams))}
    if checkpoint.data_state != wanted:
        found = sum(name.startswith("stream_") for name in checkpoint.data_state)
        reason = f"is of data in {found} streams, but [dataloader] num_streams = {num_streams}"
        if not found:
            reason = "has no state of the data that this version can resume"
        raise UserError(
            f"{checkpoint.folder} {reason}. With [checkpoint] exclude_from_loading = ['{DATALOADER}'] the data begins "
            "again.",
            table="dataloader",
            key="num_streams",
        )
