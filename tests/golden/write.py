"""Golden losses: the first steps of small runs on generated data, one ``step ntp_loss nitp_loss grad_norm`` per line.

python tests/golden/write.py          # write all of them anew, after a change that is meant to change losses
python tests/golden/write.py nitp_debug_mse
python tests/golden/write.py --json   # print what they would be
"""

import json
import os
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).parent
STEPS = 10
_NTP, _NITP, _MOE = "debug/ntp_debug", "debug/nitp_debug", "debug/nitp_moe_debug"
# Name of the file -> recipe and changes of its `[nitp]` table. A loss of a small scale gets a weight that counts.
CASES = {
    "ntp_debug": (_NTP, {}),
    "nitp_debug": (_NITP, {}),
    "nitp_moe_debug": (_MOE, {}),
    "nitp_debug_mse": (_NITP, {"loss": "mse", "weight": 20.0}),
    "nitp_debug_smooth_l1": (_NITP, {"loss": "smooth_l1", "weight": 20.0}),
    "nitp_debug_kl": (_NITP, {"loss": "kl", "weight": 20.0}),
    "nitp_debug_no_projector": (_NITP, {"projector": "none"}),
    "nitp_debug_no_temporal_shift": (_NITP, {"temporal_shift": 0}),
}
# A schedule of the recipes' shape: warm-up, then a decay in the last fifth. They clip at 1, which hides no gradient.
_TRAINING = {"seq_len": 128, "local_batch_size": 4, "global_batch_size": 4, "steps": STEPS, "max_norm": 1.0}
_COLUMNS = ("ntp_loss", "nitp_loss", "grad_norm")

Rows = dict[int, tuple[float, ...]]


def measure(name: str, folder: Path, **nitp) -> Rows:
    """Values of each step of a case, trained in ``folder``; with NTP alone there is no NITP loss.

    Args:
        nitp: further changes of `[nitp]`.
    """
    from helpers import make_config, train

    from nitp_titan.step_files import read_records

    recipe, changes = CASES[name]
    sections = {"training": _TRAINING, "lr_scheduler": {"warmup_steps": 2}, "nitp": {**changes, **nitp}}
    train(make_config(folder, recipe=recipe, **sections))
    records = read_records(folder / "metrics.jsonl")
    return {record["step"]: tuple(record[key] for key in _COLUMNS if key in record) for record in records}


def read(name: str) -> Rows:
    """The values that are kept."""
    rows = [line.split() for line in (GOLDEN / f"{name}.txt").read_text().splitlines()]
    return {int(step): tuple(float(value) for value in values if value != "-") for step, *values in rows}


def write(name: str, rows: Rows) -> None:
    lines = []
    for step, (ntp_loss, *nitp_loss, grad_norm) in rows.items():
        values = [f"{value:.8g}" for value in (ntp_loss, *nitp_loss, grad_norm)]
        lines.append(" ".join([str(step), *(values if nitp_loss else (values[0], "-", values[1]))]))
    (GOLDEN / f"{name}.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    sys.path.insert(0, str(GOLDEN.parent))
    from processes import free_port, PROJECT

    os.chdir(PROJECT)
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    os.environ |= {**one_rank, "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    # The same instructions on every CPU, and sums in one order: two threads differ from run to run by a last bit, which
    # moves a token to another expert, and steps later the losses.
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
    names = [argument for argument in sys.argv[1:] if argument != "--json"] or [*CASES]
    with tempfile.TemporaryDirectory() as folder:
        measured = {name: measure(name, Path(folder) / name) for name in names}
    if "--json" in sys.argv:
        print(json.dumps(measured))
        return
    for name, rows in measured.items():
        write(name, rows)
        print(f"tests/golden/{name}.txt")


if __name__ == "__main__":
    main()
