"""Make the local corpus and tokenizer: real text from Python's standard library.

python scripts/prepare_assets.py [--out assets/stdlib] [--vocab-size 4096]
"""

import argparse
from pathlib import Path

import _checkout  # noqa: F401

from nitp_titan.data.assets import prepare_stdlib_assets, VOCAB_SIZE
from nitp_titan.machine import exits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/stdlib"), help="folder (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="entries of the tokenizer (%(default)s)")
    arguments = parser.parse_args()
    if arguments.vocab_size < 258:
        parser.error(f"--vocab-size {arguments.vocab_size}: at least 258, all bytes and two special tokens")
    out = arguments.out
    manifest = prepare_stdlib_assets(out, arguments.vocab_size)
    state = "wrote" if manifest["new"] else "already there:"
    for split in ("train", "validation"):
        counts = manifest[split]
        print(f"{state} {out}/{split}.jsonl  {counts['documents']} documents, {counts['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    exits.run(main, kept="nothing was written; the same command starts again.")
