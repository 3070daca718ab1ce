"""The project's commands one after the other, as a user types them, in one process: run by test_safety.py.

python tests/offline.py FOLDER

The last one, alone, names a dataset of the hub; what it tries to reach is written down in a file of its own.
"""

import os
import runpy
import sys
import time
from pathlib import Path

FOLDER = Path(sys.argv[1])
ASSETS, RUNS = FOLDER / "assets", FOLDER / "runs"


def command(line: str) -> None:
    """Run ``script arguments`` or ``-m module arguments``; a status other than 0 ends this process."""
    started = time.monotonic()
    words = line.split()
    is_module, target = words[0] == "-m", words[words[0] == "-m"]
    sys.argv[:] = words[is_module:]
    # As Python does for a script.
    sys.path.insert(0, str(Path(target).parent))
    try:
        (runpy.run_module if is_module else runpy.run_path)(target, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    print(f"DONE {time.monotonic() - started:.1f} s: {line}", flush=True)


def train(variant: str, steps: int, *flags: str) -> None:
    recipe = "nitp" if variant == "nitp" else "ntp"
    data = f"--hf_assets_path {ASSETS} --dataloader.dataset_path {ASSETS}/train.jsonl"
    data += f" --validator.dataloader.dataset_path {ASSETS}/validation.jsonl"
    command(
        f"-m nitp_titan.train --recipe debug/{recipe}_debug --train-config cpu --dump_folder {RUNS}/{variant} {data} "
        f"--training.steps {steps} --validator.freq 2 --validator.steps 1 --checkpoint.interval 2 "
        f"--metrics.log_freq 1 {' '.join(flags)}"
    )


def main() -> None:
    command("scripts/recipe.py list")
    command("scripts/recipe.py check debug/nitp_debug cpu")
    command(f"scripts/prepare_assets.py --out {ASSETS} --vocab-size 512")
    command(f"scripts/prepare_local_suite.py --text {ASSETS}/validation.jsonl --out {FOLDER}/suite")
    train("ntp", 2)
    train("nitp", 2, "--lr_scheduler.total_steps 3")
    train("nitp", 3, "--lr_scheduler.total_steps 3", "--resume")
    command(f"scripts/compare.py {RUNS}/ntp {RUNS}/nitp --out {FOLDER}/report")
    command(f"scripts/export_hf.py --checkpoint {RUNS}/nitp --out {FOLDER}/hf --tokenizer {ASSETS}")
    text = FOLDER / "text.jsonl"
    text.write_text("".join((ASSETS / "validation.jsonl").read_text().splitlines(keepends=True)[:4]))
    command(
        f"scripts/evaluate.py --model {FOLDER}/hf --text {text} --suite local --limit 4 --local-suite {FOLDER}/suite "
        f"--out {FOLDER}/evaluation"
    )
    command(f"scripts/geometry.py --model {FOLDER}/hf --text {text} --tokens 1000 --out {FOLDER}/geometry")
    os.environ["NETWORK_ATTEMPTS"] += "_for_the_hub"
    train("hub", 1, "--dataloader.dataset nobody/nothing", "--dataloader.dataset_path None")


if __name__ == "__main__":
    main()
