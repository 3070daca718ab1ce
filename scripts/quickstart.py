"""Train the quickstart recipe with NTP and with NITP, the same seed, data and order, and compare the two runs.

python scripts/quickstart.py [--steps 20] [--out outputs/quickstart]

The same command resumes where it stopped; what is finished is not trained again.
"""

import argparse
import re
from functools import partial
from pathlib import Path

import _checkout  # noqa: F401

from nitp_titan.cli.launch import TrainingRun
from nitp_titan.config import recipe
from nitp_titan.data.assets import prepare_stdlib_assets
from nitp_titan.machine import exits
from nitp_titan.report.page import markdown_table, Report
from nitp_titan.report.runs import read_variants

NEXT = """
next    source .venv/bin/activate     # every other command needs it
        python scripts/recipe.py list
        torchrun --nproc_per_node 1 -m nitp_titan.train --recipe debug/nitp_debug
        python scripts/export_hf.py --checkpoint {out}/nitp --out outputs/hf/nitp"""

RECIPES = {"ntp": "debug/ntp_quickstart", "nitp": "debug/nitp_quickstart"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimizer steps per run (default: the recipe's)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/quickstart"), help="folder of both runs and the report (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1")

    manifest = prepare_stdlib_assets(Path("assets/stdlib"))
    print(
        f"corpus: {manifest['train']['documents']} documents of Python's standard library, "
        f"{manifest['train']['bytes'] / 1e6:.1f} MB (assets/stdlib)",
        flush=True,
    )
    # Curves are averages over logged steps: single batches are noisy.
    flags = ["--metrics.log_freq", "1"]
    flags += [] if arguments.steps is None else ["--training.steps", str(arguments.steps)]
    for name, recipe_name in RECIPES.items():
        run = TrainingRun(
            name=name,
            recipe=recipe.find(recipe_name, "recipes"),
            train_config=recipe.default_train_config(),
            folder=arguments.out / name,
            flags=flags,
            data=manifest["train"],
        )
        run.train(partial(_print, name))

    folder = arguments.out / "report"
    report = Report(*read_variants([f"{name}={arguments.out / name}" for name in RECIPES]))
    report.write(folder)
    print("\n" + markdown_table(report) + "\n\n" + "\n".join(report.sentences()))
    print(f"\nruns    {arguments.out}/ntp  {arguments.out}/nitp\nreport  {folder}/index.html  {folder}/report.md")
    print(NEXT.format(out=arguments.out))


def _print(run: str, message: str) -> None:
    """Print a message of a run; of the steps every tenth, the first and the last."""
    step = re.match(r"step (\d+)/(\d+)", message)
    if step is None or int(step[1]) % 10 == 0 or step[1] in ("1", step[2]):
        print(f"{run}: {message}", flush=True)


if __name__ == "__main__":
    exits.run(main, kept="runs keep what they have saved; the same command resumes.")
