"""Train a recipe.

    torchrun --nproc_per_node N -m nitp_titan.train --recipe R.toml [--train-config C.toml] [flags]

R is a recipe (what is trained; scripts/recipe.py lists them), C a train config (where and how; default:
train_configs/gpu.toml where there is a GPU, else train_configs/cpu.toml). Flags override both: --nitp.weight 0.8,
--optimizer.lr 1e-3, --training.steps 100, and every other flag of TorchTitan. --help lists them.

The same command goes on with a run that was stopped. --resume goes on with one whose recipe has changed since,
--overwrite sets it aside and starts anew. Exit status 75: the run was told to stop (SIGTERM), has saved, and can go on.
"""

import argparse
import gc
import os
import re
import sys

from nitp_titan import config_registry, errors, recipe
from nitp_titan.errors import KEPT_OF_TRAINING, UserError
from nitp_titan.ranges import OPTIMIZER_RANGES

# [optimizer] lr of a recipe is this flag of TorchTitan.
_OPTIMIZER_FLAG = re.compile(rf"--optimizer\.({'|'.join(OPTIMIZER_RANGES)})\b")
_TITAN_FLAG = r"--optimizer.param-groups.0.optimizer-kwargs.\1"


def titan_arguments(argv: list[str]) -> list[str]:
    """Our arguments as those of TorchTitan's entry point: ``--module nitp_titan --config R@C ...``.

    Raises:
        UserError: without --recipe, or outside torchrun.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--train-config", "--train_config")
    known, flags = parser.parse_known_args(argv)
    flags = [_OPTIMIZER_FLAG.sub(_TITAN_FLAG, flag) for flag in flags]
    helping = "--help" in flags or "-h" in flags
    if known.recipe is None:
        if not helping:
            raise UserError("--recipe is missing; `python scripts/recipe.py list` shows the project's own.")
        known.recipe = "debug/nitp_debug"
    if "RANK" not in os.environ and not helping:
        raise UserError(
            "training starts under torchrun: torchrun --nproc_per_node 1 -m nitp_titan.train " + " ".join(argv)
        )
    name = f"{known.recipe}@{known.train_config}" if known.train_config else known.recipe
    return ["--module", "nitp_titan", "--config", name, *flags]


def _located(error: UserError, arguments: list[str]) -> UserError:
    """The error with the file of its setting, which is not known where the setting is checked; a flag has none."""
    flags = [flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in arguments[4:]]
    section = error.table or error.key
    if section is None or any(flag == section or flag.startswith(f"{section}.") for flag in flags):
        return error
    settings = recipe.read_settings(*config_registry.paths(arguments[3]))
    return UserError(settings.place(error.table, error.key) + str(error))


def check_groups(argv: list[str], name: str) -> None:
    """Raise UserError where a flag sets the optimizer and the recipe's has several groups of parameters."""
    keys = [found[1] for flag in argv if (found := _OPTIMIZER_FLAG.match(flag))]
    if not keys:
        return
    groups = recipe.read_settings(*config_registry.paths(name)).tables.get("optimizer", {}).get("param_groups", [])
    if isinstance(groups, list) and len(groups) > 1:
        last = f"--optimizer.param-groups.{len(groups) - 1}.optimizer-kwargs.{keys[0]}"
        raise UserError(
            f"--optimizer.{keys[0]}: the recipe's optimizer has {len(groups)} groups of parameters with settings of "
            f"their own; name the group: {_OPTIMIZER_FLAG.sub(_TITAN_FLAG, f'--optimizer.{keys[0]}')} to {last}."
        )


def import_torchtitan():
    """TorchTitan's entry point, imported without looking for garbage: a second less on the CPU.

    Python's collector would go through the same growing million of objects again and again, all of which stay.
    """
    gc.disable()
    from torchtitan import train

    gc.freeze()
    gc.enable()
    return train


def main() -> None:
    errors.run(_train, kept=KEPT_OF_TRAINING)


def _train() -> None:
    arguments: list[str] = []
    try:
        arguments = titan_arguments(sys.argv[1:])
        if "--help" in arguments or "-h" in arguments:
            print(__doc__)
        path = recipe.find(arguments[3].partition("@")[0], "recipes")
        recipe.read_toml(path)
        check_groups(sys.argv[1:], arguments[3])
        sys.argv[1:] = arguments
        import_torchtitan().main()
    except UserError as error:
        raise _located(error, arguments) from None


if __name__ == "__main__":
    main()
