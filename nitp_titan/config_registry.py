"""Serves recipes to TorchTitan's own entry point.

    torchrun ... -m torchtitan.train --module nitp_titan --config debug/nitp_debug@cpu

A config's name is a recipe and, after ``@``, a train config, each by short name or path.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from nitp_titan import errors
from nitp_titan.config import recipe
from nitp_titan.errors import exit_with, KEPT_OF_TRAINING, UserError


def load(name: str):
    """``NITPTrainer.Config`` of ``<recipe>[@<train config>]``; UserError if it is wrong."""
    recipe_path, train_config_path = paths(name)

    from nitp_titan.training import cpu

    cpu.install()
    return recipe.load(recipe_path, train_config_path)


def paths(name: str) -> tuple[Path, Path | None]:
    """Files of ``<recipe>[@<train config>]``; a resolved recipe has no train config."""
    recipe_name, _, train_config_name = name.partition("@")
    recipe_path = recipe.find(recipe_name, "recipes")
    train_config_path = None
    if train_config_name:
        train_config_path = recipe.find(train_config_name, "train_configs")
    elif recipe.read_toml(recipe_path).get("resolved") is not True:
        train_config_path = recipe.default_train_config()
    return recipe_path, train_config_path


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

        from nitp_titan.runs import preflight

        preflight.install_log()
        return config

    return build


def _end_in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    errors.end(error, kept=KEPT_OF_TRAINING)
    sys.__excepthook__(kind, error, traceback)


def __dir__() -> list[str]:
    return [*globals(), *recipe.available("recipes")]
