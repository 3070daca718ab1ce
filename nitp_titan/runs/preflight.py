"""What can be known before anything is built: the tokenizer, the run folder and the room on its disk."""

import logging
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

from torch import Tensor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.observability.structured_logger import structured_logging
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.filesystem import is_remote

from nitp_titan.data.tokenizer import check_end_of_document, UnfitTokenizer
from nitp_titan.errors import surroundings, UserError

# TorchTitan asks this variable for what begins its log.
_LOG_FACTORY = "TITAN_STRUCT_LOGGER_HANDLERS"


def check_run(config, spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
    """Raise UserError for what a ``Trainer.Config`` names and is not there, or a folder that cannot take the run.

    Args:
        spec: the model to be trained, its projector included.
        tensors: of the model, as `meta_tensors` gives them; not looked at without checkpoints.
    """
    _check_tokenizer(config, spec)
    check_writable(config.dump_folder)
    _check_room(config, tensors)


def _check_tokenizer(config, spec: ModelSpec) -> None:
    path, vocab_size = config.hf_assets_path, spec.model.vocab_size
    try:
        tokenizer: BaseTokenizer = config.tokenizer.build(tokenizer_path=path)
        check_end_of_document(tokenizer)
    except UnfitTokenizer as error:
        raise UserError(f"hf_assets_path = '{path}'{error}", table="", key="hf_assets_path") from None
    except Exception as error:
        # The tokenizers' library raises nothing narrower.
        reason = f"holds no tokenizer that loads: {type(error).__name__}: {error}"
        found = surroundings(error, path)
        raise found or UserError(f"hf_assets_path = '{path}' {reason}", table="", key="hf_assets_path") from None
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"hf_assets_path = '{path}' has {tokenizer.get_vocab_size()} tokens, more than the model's vocabulary of "
            f"{vocab_size}.",
            table="",
            key="hf_assets_path",
        )


def check_writable(dump_folder: str) -> None:
    """Raise UserError unless a run folder is there or can be made, and files in it; leaves nothing behind."""
    if is_remote(dump_folder):
        return
    folder = _existing(dump_folder)
    try:
        for name in Path(dump_folder).absolute().relative_to(folder).parts:
            # A name may be too long.
            with suppress(FileNotFoundError):
                os.stat(folder / name)
        # Root may write where the permissions say no, and may not in /proc where they say yes: try.
        with tempfile.TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        message = f"dump_folder = '{dump_folder}' cannot be written: {folder}: {error.strerror}."
        raise UserError(message, table="", key="dump_folder") from None


def _existing(path: str) -> Path:
    """The nearest folder or file at or above a path that is there."""
    path = Path(path).absolute()
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


class _Kept(logging.Handler):
    """Keeps records until the run folder is this run's: a start that is refused leaves nothing behind."""

    def __init__(self, **options):
        super().__init__()
        self.options, self.records = options, []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def begin_log(*, structured_logger: logging.Logger, **options) -> None:
    """TorchTitan's structured log, which it begins before it builds a trainer; `open_log` writes it."""
    structured_logger.addHandler(_Kept(structured_logger=structured_logger, **options))


def open_log(output_dir: str) -> None:
    """Write the structured log of a run folder from now on, and what it has kept so far.

    A record that cannot be written ends training as a checkpoint does that cannot be written; by itself `logging` would
    print a traceback for each.
    """
    log = structured_logging._structured_logger
    for kept in [handler for handler in log.handlers if isinstance(handler, _Kept)]:
        log.removeHandler(kept)
        if kept.options["output_dir"] != output_dir:
            # Of an earlier start in this process, which was refused.
            continue
        before = list(log.handlers)
        module, _, factory = structured_logging._DEFAULT_HANDLER_FACTORY.rpartition(".")
        getattr(import_module(module), factory)(**kept.options)
        for handler in log.handlers:
            if handler not in before:
                handler.handleError = partial(_end_log, handler)
                for record in kept.records:
                    handler.handle(record)


def _end_log(handler: logging.Handler, record: logging.LogRecord) -> None:
    error = sys.exc_info()[1]
    # Closing it would write once more.
    structured_logging._structured_logger.removeHandler(handler)
    raise surroundings(error, getattr(handler, "baseFilename", "")) or error


def install_log() -> None:
    """Make TorchTitan begin its log with `begin_log`, unless the user chose a factory."""
    os.environ.setdefault(_LOG_FACTORY, f"{begin_log.__module__}.{begin_log.__name__}")


def checkpoint_bytes(config, tensors: dict[str, Tensor]) -> int:
    """Bytes of the largest checkpoint that a run saves: its model, and what the optimizer keeps of each parameter.

    Args:
        tensors: of the model to be trained, its projector included.
    """
    settings, steps = config.checkpoint, config.training.steps
    element = {"float32": 4, "bfloat16": 2}[config.training.dtype]
    numbers = sum(tensor.numel() for tensor in tensors.values())
    if steps < settings.interval and settings.last_save_model_only and not settings.enable_first_step_checkpoint:
        return numbers * {"float32": 4, "bfloat16": 2, "float16": 2}[settings.export_dtype]
    adam = all(group.optimizer_name in ("Adam", "AdamW") for group in config.optimizer.param_groups)
    state = 2 if config.optimizer.implementation == "fused_opt_states_bf16" else element
    # Adam keeps two moments, Muon one.
    return numbers * (element + (2 if adam else 1) * state)


def _check_room(config, tensors: dict[str, Tensor]) -> None:
    settings = config.checkpoint
    if not settings.enable or settings.load_only or is_remote(config.dump_folder) or is_remote(settings.folder):
        return
    folder = _existing(os.path.join(config.dump_folder, settings.folder))
    free, needed = shutil.disk_usage(folder).free, checkpoint_bytes(config, tensors)
    if free < needed:
        raise UserError(
            f"dump_folder = '{config.dump_folder}': one checkpoint needs {_gb(needed)} and the disk has {_gb(free)} "
            "free; choose another dump_folder, or [checkpoint] enable = false.",
            table="",
            key="dump_folder",
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.3f} GB"
