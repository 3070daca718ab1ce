"""Worker under torchrun: trains one seed checkpoint on a list of layouts and writes the figures as JSON.

    torchrun --nproc_per_node N tests/distributed/layouts.py FOLDER LAYOUTS.json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from helpers import gradient_norms, make_config, parameters

from nitp_titan.metrics_file import read_records

SEED_FLAGS = {"enable": True, "create_seed_checkpoint": True}


def run_layout(folder: Path, name: str, sections: dict) -> dict:
    sections = dict(sections)
    sections["checkpoint"] = {
        "enable": True, "load_only": True, "initial_load_path": str(folder / "seed/checkpoint/step-0"),
    }
    trainer = make_config(folder / name, **sections).build()
    trainer.checkpointer.load(step=-1)
    batches = trainer.batch_generator(trainer.dataloader)
    norms = []
    for trainer.step in range(1, trainer.config.training.steps + 1):
        trainer.train_step(batches)
        norms.append(gradient_norms(trainer))
    trainer.close()
    weights = sum(value.double().square().sum().item() for value in parameters(trainer).values()) ** 0.5
    return {"norms": norms, "weights": weights}


def main() -> None:
    folder, layouts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    results = {name: run_layout(folder, name, sections) for name, sections in layouts.items()}
    if torch.distributed.get_rank() == 0:
        for name, result in results.items():
            result["records"] = read_records(folder / name / "metrics.jsonl")
            (folder / f"{name}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
