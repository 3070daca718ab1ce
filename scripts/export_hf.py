"""Export a checkpoint as a Hugging Face model that AutoModelForCausalLM loads without remote code.

python scripts/export_hf.py --checkpoint outputs/debug/nitp_debug --out outputs/hf/nitp_debug
python scripts/export_hf.py --checkpoint outputs/moe/nitp_9b_a1b/checkpoint/step-39339 --out 9b --dtype bfloat16

The run folder says which model it is. Of a run folder the latest checkpoint is taken. The projector, the optimizer and
the rest of the training state stay behind.
"""

import argparse
import logging
from pathlib import Path

import _checkout  # noqa: F401

from nitp_titan.export.dtypes import DTYPES
from nitp_titan.machine import exits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step's folder, or a run folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, new or with this very export")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (%(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: the recipe's hf_assets_path)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file, for example 500MB (default: 5GB)")
    arguments = parser.parse_args()
    # Imported once the arguments are right: TorchTitan takes seconds.
    logging.disable(logging.WARNING)
    from nitp_titan.checkpoint.stored import Checkpoint, RESOLVED
    from nitp_titan.export.export import Export
    from nitp_titan.machine import cpu
    from nitp_titan.training.trainer import load_config

    cpu.install()
    checkpoint = Checkpoint(arguments.checkpoint)
    config = load_config(checkpoint.run_folder / RESOLVED, None)
    export = Export(
        checkpoint,
        config,
        dtype=arguments.dtype,
        tokenizer=arguments.tokenizer,
        max_shard_size=arguments.max_shard_size,
    )
    print(f"{checkpoint.folder}: {export.architecture}, {arguments.dtype}", flush=True)
    done = export.write(arguments.out, log=lambda line: print(line, flush=True))
    for note in export.notes():
        print(f"note: {note}")
    left_out = f", without {len(done.left_out)} tensors of the projector" if done.left_out else ""
    print(f"{done.folder}: {done.parameters:,} parameters, {done.num_bytes / 1e9:.3f} GB{left_out}")


if __name__ == "__main__":
    exits.run(main, kept="nothing was written; the same command starts again.")
