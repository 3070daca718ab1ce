"""Effective rank, cosine and spectrum of pretrained models' hidden states, layer by layer, on a text of yours.

python scripts/geometry.py --model outputs/hf/nitp --text assets/stdlib/validation.jsonl --out outputs/geometry
python scripts/geometry.py --model ntp=outputs/hf/ntp nitp=outputs/hf/nitp \\
    --text corpus.jsonl --dtype bfloat16 --out outputs/geometry         # side by side, differences to the first

Any causal language model that transformers loads: a folder, or owner/name on the Hugging Face hub. The statistics are
those of training's geometry.jsonl. The first --seq-len tokens of every document are one sequence; all models read the
same documents, as many as hold --tokens tokens of the first model.
"""

import argparse
from pathlib import Path

import _checkout  # noqa: F401

from nitp_titan.evaluation.geometry import (
    check,
    GeometrySettings,
    measure_models,
)
from nitp_titan.evaluation.pretrained import read_models
from nitp_titan.files import check_writable
from nitp_titan.machine import exits
from nitp_titan.progress import log_line
from nitp_titan.report.pretrained_geometry import as_json, tables, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, defaults = parser.add_argument, GeometrySettings
    add("--model", nargs="+", action="append", required=True, metavar="[NAME=]MODEL", help="a folder, or owner/name")
    add("--text", type=Path, required=True, help="JSON lines, parquet, or .txt with blank lines between documents")
    add("--text-field", default=defaults.text_field, help="field of the JSON lines (%(default)s)")
    add("--seq-len", type=int, default=defaults.seq_len, help="tokens per document (%(default)s)")
    add("--tokens", type=int, default=defaults.tokens, help="at most so many in all (%(default)s)")
    add("--batch-size", type=int, default=defaults.batch_size, help="sequences at a time (%(default)s)")
    add("--dtype", default=defaults.dtype, help="float32, bfloat16 or float16 (%(default)s)")
    add("--device", default=defaults.device, help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--num-pairs", type=int, default=defaults.num_pairs, help="sampled pairs (%(default)s)")
    add("--seed", type=int, default=defaults.seed, help="of the sampled pairs (%(default)s)")
    add("--out", type=Path, required=True, help="folder of geometry.json, geometry.md and the plots")
    add("--json", action="store_true", help="print geometry.json instead of the table")
    arguments = vars(parser.parse_args())
    models, out, as_text = arguments.pop("model"), arguments.pop("out"), arguments.pop("json")
    settings = GeometrySettings(**arguments)
    models = read_models([model for several in models for model in several])
    check(settings)
    check_writable(out, f"--out {out}")
    result = measure_models(models, settings)
    files = write(result, out)
    print(as_json(result) if as_text else tables(result))
    for line in result["warnings"]:
        log_line(f"warning: {line}")
    if not as_text:
        print("\n" + "\n".join(map(str, files)))


if __name__ == "__main__":
    exits.run(main, kept="nothing was written; the same command starts again.")
