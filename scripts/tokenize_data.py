"""Tokenize text once, for `[dataloader] dataset = "tokens"`.

python scripts/tokenize_data.py --dataset-path assets/stdlib/train.jsonl --tokenizer assets/stdlib --out tokens/stdlib
python scripts/tokenize_data.py --dataset parquet --dataset-path "my_data/*.parquet" --text-field question answer \
    --tokenizer assets/qwen2 --out tokens/mine
python scripts/tokenize_data.py --dataset allenai/c4 --subset en --tokenizer assets/qwen2 --out tokens/c4

The flags of the text are the keys of `[dataloader]`. The files of tokens do not depend on --workers. Where the command
was ended, the same one resumes, and keeps the shards that are finished.
"""

import argparse
import logging
import os
from pathlib import Path

import _checkout  # noqa: F401

from nitp_titan.data.mixtures import TextSource
from nitp_titan.errors import UserError
from nitp_titan.machine import exits


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="json", help="json (default), parquet, or a Hugging Face dataset owner/name")
    add("--dataset-path", help="file, folder or pattern of local files")
    add("--text-field", nargs="+", default=["text"], help="field of the text (default: text); several are joined")
    add("--subset", help="configuration of a Hugging Face dataset")
    add("--split", default="train", help="split of a Hugging Face dataset (default: train)")
    add("--streaming", action=argparse.BooleanOptionalAction, help="read on the fly (default: Hugging Face datasets)")
    add("--tokenizer", required=True, help="folder of the tokenizer, the recipe's hf_assets_path")
    add("--out", type=Path, required=True, help="folder of the tokens")
    shards = "files of tokens (default: 64 or one per 256 MiB of text; of a stream one per file)"
    add("--num-shards", type=int, help=shards)
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    add("--verify", action="store_true", help="compare the finished files with their hashes")
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: at least 1.")
    fields = arguments.text_field
    source = TextSource(
        dataset=arguments.dataset,
        dataset_path=arguments.dataset_path,
        text_field=fields[0] if len(fields) == 1 else fields,
        subset=arguments.subset,
        split=arguments.split,
        streaming=arguments.streaming,
    )
    # Imported once the arguments are right: TorchTitan takes seconds.
    logging.disable(logging.WARNING)
    from nitp_titan.data.tokens.writing import tokenize, verify

    manifest, is_new = tokenize(
        source,
        arguments.tokenizer,
        arguments.out,
        num_shards=arguments.num_shards,
        num_workers=arguments.workers,
        log=lambda line: print(line, flush=True),
    )
    if arguments.verify:
        verify(arguments.out, manifest)
    what = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens in {len(manifest.shards)} shards"
    print(
        f"{'wrote' if is_new else 'already there:'} {arguments.out}  {what}{', verified' if arguments.verify else ''}"
    )


if __name__ == "__main__":
    exits.run(main, kept="finished shards are kept; the same command resumes.")
