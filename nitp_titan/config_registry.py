"""Serves recipes to TorchTitan's own entry point.

    torchrun ... -m torchtitan.train --module nitp_titan --config debug/nitp_debug@cpu

A config's name is a recipe and, after ``@``, a train config, each by short name or path.
"""

from collections.abc import Callable

from nitp_titan import recipe
from nitp_titan.config import exit_with, UserError


def load(name: str):
    """``NITPTrainer.Config`` of ``<recipe>[@<train config>]``; UserError if it is wrong."""
    recipe_name, _, train_config_name = name.partition("@")
    recipe_path = recipe.find(recipe_name, "recipes")
    train_config_path = None
    if train_config_name:
        train_config_path = recipe.find(train_config_name, "train_configs")
    elif recipe.read_toml(recipe_path).get("resolved") is not True:
        train_config_path = recipe.default_train_config()

    from nitp_titan import cpu

    cpu.install()
    return recipe.load(recipe_path, train_config_path)


def __getattr__(name: str) -> Callable:
    if name.startswith("_") or not recipe.find(name.partition("@")[0], "recipes").exists():
        raise AttributeError(name)

    def config():
        try:
            return load(name)
        except UserError as error:
            # TorchTitan's entry point has no place for user errors.
            exit_with(error)

    return config


def __dir__() -> list[str]:
    return [*globals(), *recipe.available("recipes")]
