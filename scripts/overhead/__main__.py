"""What NITP costs beside NTP and beside multi-token prediction: measured on this machine, and counted at full size.

python scripts/overhead                                    # all of it, 20 minutes on 2 CPU cores
python scripts/overhead --only measured --rounds 200       # one part; the others keep what they had
python scripts/overhead --only measured --recipe debug/nitp_moe_debug

measured    NTP, NITP and MTP take turns step by step on the same batches. On a GPU with bfloat16, then compiled with
            CUDA graphs, then with float8 too, by default the largest dense model of which all three fit.
full_size   FLOPs, activation memory and communication of the paper's seven models, counted on fake tensors.
growth      NITP's share against sequence length, model dimension and number of ranks, counted likewise.

Writes overhead.json, overhead.md and plots.
"""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

# `python scripts/overhead` has the folder itself on the path, not the one it lies in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _checkout  # noqa: F401

from nitp_titan.config import recipe
from nitp_titan.errors import nearest_choice, UserError
from nitp_titan.machine import exits

PARTS = ("measured", "full_size", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="repeat (default: all parts)")
    parser.add_argument("--recipe", help="a NITP recipe to measure (default: overhead/nitp_ratio_9b on a CPU)")
    parser.add_argument("--train-config", help="where and how (default: cpu, or h100x1 where there is a GPU)")
    parser.add_argument("--rounds", type=int, default=100, help="steps of every variant that count (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps of every variant before (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/overhead"), help="folder (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print overhead.json instead of the tables")
    arguments = parser.parse_args()
    for name, least in (("rounds", 3), ("warmup", 0)):
        if (value := getattr(arguments, name)) < least:
            raise UserError(f"--{name} {value}: it must be at least {least}.")
    for folder, name in (("recipes", arguments.recipe), ("train_configs", arguments.train_config)):
        if name is not None and not recipe.find(name, folder).is_file():
            raise UserError(f"{name} is not among the {folder}.{nearest_choice(name, recipe.available(folder))}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("without torchrun: one process, as several models in one world of ranks do not get along.")

    # TorchTitan's own lines are about training.
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    from nitp_titan.files import check_writable
    from overhead import bench, report

    check_writable(arguments.out, f"--out {arguments.out}")
    for part in arguments.only or PARTS:
        if part == "measured":
            found = bench.measured(
                arguments.recipe, arguments.train_config, num_rounds=arguments.rounds, num_warmup=arguments.warmup
            )
        else:
            found = getattr(bench, part)()
        # After every part: the next may take minutes.
        files = report.write(report.merged(arguments.out, part, found), arguments.out)
    result = report.read(arguments.out)
    print(report.as_json(result) if arguments.json else report.tables(result))
    if not arguments.json:
        print("\n" + "\n".join(map(str, files)))


if __name__ == "__main__":
    exits.run(main, kept="the parts that were finished are kept; --only gives the others.")
