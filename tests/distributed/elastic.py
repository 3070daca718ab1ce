"""Worker on each of two ranks: runs that change their layout halfway, on two ranks and on one.

    tests/distributed/elastic.py FOLDER RUNS.json

RUNS.json lists the parts of runs in order: ``name`` of the run, ``model``, ``steps`` up to which it trains,
(0: only a seed checkpoint is made), ``layout`` (degrees, or null for rank 0 alone) and the free ``port`` of its process
group. A run resumes in its own folder. Rank r appends ``[step, hash]`` of every sequence that it reads to
``<name>/sequences.<r>.jsonl``.
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import make_config
from layouts import in_child, make_seed
from matrix import DEGREES, MODELS

from nitp_titan.data.loader import TextDataLoader
from nitp_titan.training.trainer import NITPTrainer

GLOBAL_BATCH, NUM_STREAMS = 4, 2


class Recorded(TextDataLoader):
    """The project's loader; notes what it gives to the training step."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(TextDataLoader.Config):
        folder: str = ""

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self._record = Path(config.folder) / f"sequences.{os.environ['RANK']}.jsonl"

    def __iter__(self):
        for inputs, labels in super().__iter__():
            step = (self._state["sequence"] - 1) // GLOBAL_BATCH + 1
            with self._record.open("a") as file:
                for tokens, target in zip(inputs["input"], labels):
                    digest = hashlib.sha256(tokens.numpy().tobytes() + target.numpy().tobytes()).hexdigest()[:16]
                    file.write(json.dumps([step, digest]) + "\n")
            yield inputs, labels


def train(folder: Path, part: dict) -> dict:
    if part["steps"] == 0:
        make_seed(folder, part["model"])
        return {}
    run = folder / part["name"]
    degrees = {DEGREES[key]: value for key, value in (part["layout"] or {}).items()}
    data_ranks = (part["layout"] or {}).get("shard", 1)
    validation = TextDataLoader.Config(dataset_path=str(folder / "validation.jsonl"), infinite=False)
    config = make_config(
        run,
        generated_data=False,
        model=MODELS[part["model"]],
        nitp={"weight": 20.0, "target_layer": 2},
        training={
            "steps": part["steps"],
            "seq_len": 256,
            "global_batch_size": GLOBAL_BATCH,
            "local_batch_size": GLOBAL_BATCH // data_ranks,
        },
        lr_scheduler={"total_steps": 6},
        parallelism=degrees,
        checkpoint={
            "enable": True,
            "interval": 100,
            "last_save_model_only": False,
            "keep_latest_k": 0,
            "initial_load_path": str(folder / "seeds" / part["model"] / "checkpoint/step-0"),
        },
        # All of a few documents: the streams of two ranks end after other batches.
        validator={"enable": True, "freq": 100, "steps": -1, "dataloader": validation},
        resume=True,
    )
    # Adam gives the smallest gradient a full step, and with it their rounding; a large eps does not.
    config.optimizer.param_groups[0].optimizer_kwargs["eps"] = 1e-3
    run.mkdir(parents=True, exist_ok=True)
    data = {field.name: getattr(config.dataloader, field.name) for field in dataclasses.fields(config.dataloader)}
    data |= {"folder": str(run), "num_streams": NUM_STREAMS}
    trainer: NITPTrainer = dataclasses.replace(config, dataloader=Recorded.Config(**data)).build()
    trainer.train()
    trainer.close()
    return {}


def main() -> None:
    folder, parts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for index, part in enumerate(parts):
        result = folder / f"{part['name']}.{index}.json"
        if part["layout"] is None:
            if os.environ["RANK"] == "0":
                alone = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
                in_child(result, part["port"], partial(_with, alone, partial(train, folder, part)))
            while not any(result.parent.glob(f"{result.stem}.*")):
                time.sleep(0.1)
        else:
            in_child(result, part["port"], partial(train, folder, part))


def _with(variables: dict[str, str], work):
    os.environ.update(variables)
    return work()


if __name__ == "__main__":
    main()
