"""Serves recipes to TorchTitan's own entry point.

    torchrun ... -m torchtitan.train --module nitp_titan --config debug/nitp_debug@cpu

A config's name is a recipe and, after ``@``, a train config, each by short name or path.
"""

import sys
from collections.abc import Callable
from types import TracebackType

from nitp_titan.config import recipe
from nitp_titan.errors import UserError
from nitp_titan.machine import cpu, exits
from nitp_titan.machine.exits import exit_with, KEPT_OF_TRAINING
from nitp_titan.runs import structured_log
from nitp_titan.training.trainer import load_config, NITPTrainer


def load(name: str) -> NITPTrainer.Config:
    """``NITPTrainer.Config`` of ``<recipe>[@<train config>]``; UserError if it is wrong."""
    recipe_path, train_config_path = recipe.locate(name)
    cpu.install()
    return load_config(recipe_path, train_config_path)


def __getattr__(name: str) -> Callable:
    if (name.startswith("__") and name.endswith("__")) or not recipe.find(name.partition("@")[0], "recipes").exists():
        raise AttributeError(name)

    def build():
        # TorchTitan's entry point, which alone asks for this function, has no place for user errors.
        sys.excepthook = _end_in_one_line
        try:
            config = load(name)
        except UserError as error:
            exit_with(error)
        structured_log.install()
        return config

    return build


def _end_in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    exits.end(error, kept=KEPT_OF_TRAINING)
    sys.__excepthook__(kind, error, traceback)


def __dir__() -> list[str]:
    return [*globals(), *recipe.available("recipes")]
