"""Build and load a run, counting what each rank opens and looks at; test_start_at_scale.py starts it.

    torchrun ... counted_start.py OUT [arguments of nitp_titan.train]

OUT gets a file per rank: accesses of source code, tokenizer, text and checkpoint until the ranks have agreed, then
until the checkpoint is loaded.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

from nitp_titan import train
from nitp_titan.runs import ranks
from nitp_titan.training.trainer import NITPTrainer

KINDS = {".py": "code", "tokenizer.json": "tokenizer", "train.jsonl": "text", ".distcp": "checkpoint"}
out = Path(sys.argv.pop(1))
counts = [Counter(), Counter()]
phase = 0
own_code = str(Path(ranks.__file__).resolve().parents[1])


def count(access: str, path) -> None:
    name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), None)
    if kind is not None and (kind != "code" or name.startswith(own_code)):
        counts[phase][f"{kind} {access}"] += 1


def counted_stat(path, *args, stat=os.stat, **kwargs):
    count("looked at", path)
    return stat(path, *args, **kwargs)


def agree(*args, agreed=ranks.agree):
    global phase
    found = agreed(*args)
    phase = 1
    return found


def load(self, step: int = -1) -> None:
    self.checkpointer.load(step=self.config.checkpoint.load_step)
    # Python looks at source code to import it.
    parts = [{name: n for name, n in part.items() if name != "code looked at"} for part in counts]
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(parts))
    self.close()


train.import_torchtitan()
NITPTrainer.train = load
ranks.agree = agree
sys.addaudithook(lambda event, values: count("opened", values[0]) if event == "open" else None)
os.stat = counted_stat
train.main()
