"""Fetch tokenizers from the Hugging Face hub; HF_TOKEN in the environment for gated ones.

python scripts/download_assets.py qwen2 [owner/name ...] [--out assets]
"""

import argparse
from pathlib import Path

import _checkout  # noqa: F401

from nitp_titan.data.hub import describe, download_tokenizer, TOKENIZERS
from nitp_titan.machine import exits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(TOKENIZERS)}, or any owner/name")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder of their folders (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list the registered tokenizers")
    arguments = parser.parse_args()
    if not arguments.names and not arguments.list:
        parser.error("name a tokenizer, or --list")
    if arguments.list:
        for name, repo in TOKENIZERS.items():
            print(f"{name:8} {repo}")
    for name in arguments.names:
        result = download_tokenizer(name, arguments.out)
        state = "wrote" if result["new"] else "already there:"
        print(f"{state} {result['folder']}  {describe(result['folder'])}, from {result['repository']}")


if __name__ == "__main__":
    exits.run(main, kept="finished tokenizers are kept; the same command resumes.")
