"""Worker on each of two ranks: starts runs from Hugging Face models on two ranks, takes a step and saves a checkpoint.

    tests/distributed/from_hf.py FOLDER PORTS.json

PORTS.json holds ``{name: free port}`` of `STARTS`; ``FOLDER/<name>/hf`` is the model.
"""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import saved_run
from layouts import in_child
from torchtitan.components.optimizer import default_adamw

from nitp_titan.models.settings import ModelConfig

TWO_SHARDS = {"data_parallel_shard_degree": 2}
STARTS = {
    "llama3/debug": {"data_parallel_shard_degree": 1, "tensor_parallel_degree": 2},
    "moe/debug": {**TWO_SHARDS, "expert_parallel_degree": 2},
    "gpt_oss/debug": {**TWO_SHARDS, "expert_parallel_degree": 2},
    "qwen3/debug_moe": TWO_SHARDS,
}


def start(folder: Path, model: str, ranks: int) -> None:
    """Take one step of four sequences, on one rank or on the model's layout, and save a checkpoint."""
    family, _, flavor = model.partition("/")
    training = {"seq_len": 128, "global_batch_size": 4, "steps": 1, "max_norm": 1e9}
    data_ranks = 1 if "tensor_parallel_degree" in STARTS[model] else ranks
    saved_run(
        folder / model / str(ranks),
        model=ModelConfig(family=family, flavor=flavor),
        # The fresh projector differs by layout, so it is not trained.
        nitp={"weight": 20.0, "start_step": 10},
        # Adam gives the smallest gradient a full step, and with it their rounding; a large eps does not.
        optimizer=default_adamw(lr=1e-3, eps=1e-3),
        training={**training, "local_batch_size": 4 // data_ranks},
        parallelism=STARTS[model] if ranks > 1 else {},
        checkpoint={"initial_load_path": str(folder / model / "hf"), "initial_load_in_hf": True},
    )


def main() -> None:
    folder, ports = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for model, port in ports.items():
        in_child(folder / f"{model}.json", port, partial(start, folder, model, 2))


if __name__ == "__main__":
    main()
