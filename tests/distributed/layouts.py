"""Worker under torchrun: trains one seed checkpoint on a list of layouts and writes the figures as JSON.

    torchrun --nproc_per_node N tests/distributed/layouts.py FOLDER LAYOUTS.json

LAYOUTS.json holds ``{name: {"port": free port, "sections": changes to the debug recipe}}``.
"""

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import gradient_norms, make_config, parameters

from nitp_titan.metrics_file import read_records


def run_layout(folder: Path, name: str, sections: dict) -> dict:
    """Figures of one layout: float64 gradient norms per step, the norm of all weights, logged metrics."""
    seed = str(folder / "seed/checkpoint/step-0")
    sections = {**sections, "checkpoint": {"enable": True, "load_only": True, "initial_load_path": seed}}
    config = make_config(folder / name, **sections)
    # Adam gives the smallest gradient a full step, and with it their rounding; a large eps does not.
    config.optimizer.param_groups[0].optimizer_kwargs["eps"] = 1e-3
    trainer = config.build()
    trainer.checkpointer.load(step=-1)
    batches = trainer.batch_generator(trainer.dataloader)
    norms = []
    for step in range(1, trainer.config.training.steps + 1):
        trainer.step = step
        trainer.train_step(batches)
        norms.append(gradient_norms(trainer))
    trainer.close()
    weights = sum(value.double().square().sum().item() for value in parameters(trainer).values()) ** 0.5
    return {"norms": norms, "weights": weights}


def in_child(folder: Path, name: str, port: int, sections: dict) -> bool:
    """Run a layout in a forked process: TorchTitan's meshes are globals, its import takes seconds."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    status = 1
    try:
        os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
        result = run_layout(folder, name, sections)
        if os.environ["RANK"] == "0":
            result["records"] = read_records(folder / name / "metrics.jsonl")
            (folder / f"{name}.json").write_text(json.dumps(result))
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    folder, layouts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    failed = [name for name, layout in layouts.items() if not in_child(folder, name, **layout)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
