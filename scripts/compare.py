"""Compare training runs by their metrics.

python scripts/compare.py --run ntp=outputs/a --run nitp=outputs/b --out outputs/report
"""

import argparse
from pathlib import Path

from nitp_titan.config import exit_with, UserError
from nitp_titan.report import read_run, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER", help="an arm; repeat per arm")
    parser.add_argument("--out", type=Path, required=True, help="folder of report.md and losses.png")
    arguments = parser.parse_args()
    try:
        named = [run.partition("=") for run in arguments.run]
        runs = [read_run(name, Path(folder or name)) for name, _, folder in named]
    except UserError as error:
        exit_with(error)
    print(write_report(runs, arguments.out))
    print(f"\n{arguments.out}/report.md  {arguments.out}/losses.png")


if __name__ == "__main__":
    main()
