"""TorchTitan's structured log, which begins before a run folder is this run's.

A start that is refused leaves nothing behind: records are kept until the folder is claimed.
"""

import logging
import os
import sys
from functools import partial
from importlib import import_module

from torchtitan.observability.structured_logger import structured_logging

from nitp_titan.machine.failures import surroundings

# TorchTitan asks this variable for what begins its log.
_LOG_FACTORY = "TITAN_STRUCT_LOGGER_HANDLERS"


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


def install() -> None:
    """Make TorchTitan begin its log with `begin_log`, unless the user chose a factory."""
    os.environ.setdefault(_LOG_FACTORY, f"{begin_log.__module__}.{begin_log.__name__}")
