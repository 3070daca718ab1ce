"""Make the local corpus and tokenizer: real text from Python's standard library.

python scripts/prepare_assets.py [--out assets/stdlib]
"""

import argparse
from pathlib import Path

from nitp_titan.assets import prepare_stdlib_assets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("assets/stdlib"))
    out = parser.parse_args().out
    manifest = prepare_stdlib_assets(out)
    state = "wrote" if manifest["new"] else "already there:"
    for split in ("train", "validation"):
        counts = manifest[split]
        print(f"{state} {out}/{split}.jsonl  {counts['documents']} documents, {counts['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
