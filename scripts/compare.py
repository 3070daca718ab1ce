"""Compare training runs: one page, a Markdown report and plots from their run folders.

python scripts/compare.py outputs/debug/ntp_debug outputs/debug/nitp_debug --out outputs/report
python scripts/compare.py outputs/study/ntp outputs/study/nitp --out outputs/report   # a run per seed in each
python scripts/compare.py small=outputs/a large=outputs/b --out outputs/report               # names of your own

Runs that differ in their seed only are one variant; the variant without NITP is the baseline. Unfinished runs are
compared up to their last step.
"""

import argparse
from pathlib import Path

import _checkout  # noqa: F401

from nitp_titan.errors import UserError
from nitp_titan.machine import exits
from nitp_titan.report.page import markdown_table, Report
from nitp_titan.report.runs import read_variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="a run folder, or a folder of run folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of index.html, report.md and the plots")
    parser.add_argument(
        "--spectrum-step", type=int, action="append", default=[], help="step whose eigenvalue spectra are drawn; repeat"
    )
    arguments = parser.parse_args()
    variants, problems = read_variants(arguments.runs)
    report = Report(variants, problems, spectrum_steps=arguments.spectrum_step)
    try:
        report.write(arguments.out)
    except OSError as error:
        raise UserError(f"--out {arguments.out} cannot be written: {error.strerror}.") from None
    print(markdown_table(report) + "\n")
    for line in [*report.settings.warnings, *problems]:
        print(f"warning: {line}")
    print(f"{arguments.out}/index.html  {arguments.out}/report.md")


if __name__ == "__main__":
    exits.run(main, kept="nothing was written, or not all of it; the same command starts again.")
