"""Make a benchmark from any text, for `python scripts/evaluate.py --suite local`: no network is needed.

python scripts/prepare_local_suite.py                                         # from assets/stdlib
python scripts/prepare_local_suite.py --text my.jsonl --out assets/my_suite   # for --local-suite assets/my_suite
"""

import argparse
from pathlib import Path

import _checkout  # noqa: F401

from nitp_titan.errors import UserError
from nitp_titan.evaluation.local_suite import DEFAULT_FOLDER, DEFAULT_TEXT, prepare
from nitp_titan.machine import exits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="JSON lines (%(default)s)")
    parser.add_argument("--text-field", default="text", help="field that holds a line's text (%(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help="folder of the suite (%(default)s)")
    arguments = parser.parse_args()
    if arguments.text == DEFAULT_TEXT and not DEFAULT_TEXT.is_file():
        raise UserError(f"{DEFAULT_TEXT} is missing; run `python scripts/prepare_assets.py`, or name another --text.")
    manifest = prepare(arguments.text, arguments.out, arguments.text_field)
    what = f"{manifest['documents']} documents, {manifest['passages']} passages"
    print(f"{arguments.out}: {what}{'' if manifest['new'] else ', as before'}")


if __name__ == "__main__":
    exits.run(main, kept="nothing was written; the same command starts again.")
