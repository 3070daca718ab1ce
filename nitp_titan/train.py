"""Train a recipe.

    torchrun --nproc_per_node N -m nitp_titan.train --recipe R.toml [--train-config C.toml] [flags]

R is a recipe (what is trained; scripts/recipe.py lists them), C a train config (where and how; default:
train_configs/gpu.toml where there is a GPU, else train_configs/cpu.toml). Flags override both: --nitp.weight 0.8,
--optimizer.lr 1e-3, --training.steps 100, and every other flag of TorchTitan. --help lists them.
"""

import argparse
import os
import re
import sys

from nitp_titan import recipe
from nitp_titan.config import exit_with, OPTIMIZER_RANGES, UserError

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


def main() -> None:
    try:
        arguments = titan_arguments(sys.argv[1:])
        if "--help" in arguments or "-h" in arguments:
            print(__doc__)
        path = recipe.find(arguments[3].partition("@")[0], "recipes")
        recipe.read_toml(path)

        from torchtitan import train

        sys.argv[1:] = arguments
        train.main()
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
