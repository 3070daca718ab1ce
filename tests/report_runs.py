"""Run folders with made-up metrics."""

import json
from pathlib import Path

SETTINGS = {
    "dump_folder": "somewhere",
    "nitp": {"weight": 0.0, "loss": "cosine"},
    "training": {"steps": 100, "global_batch_size": 4, "seq_len": 128},
    "dataloader": {"dataset_path": "train.jsonl"},
    "debug": {"seed": 1},
    "metrics": {"log_freq": 1, "run_name": "debug/ntp_debug", "run_group": "llama3 debug"},
}


def three_phases(step: int) -> float:
    if step <= 10:
        return 1.0 - 0.099 * step
    return 0.01 + 0.3 * (step - 10) / 40 if step <= 50 else 0.31 - 0.2 * (step - 50) / 50


def _state(rank: float, cosine: float) -> dict:
    spectrum = {"rank": [1, 2, 4, 8], "share": [0.5, 0.2, 0.05, 0.0]}
    return {"tokens": 512, "effective_rank": rank, "cosine": cosine, "spectrum": spectrum}


def _write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(folder: Path, *, nitp=None, seed: int = 1, steps: int = 100, better: float = 0.0, **settings) -> Path:
    """A run of 100 planned steps.

    Args:
        nitp: NITP loss as a function of the step; None for NTP alone.
        better: by how much its NTP losses are lower.
        settings: tables that differ from `SETTINGS`.
    """
    folder.mkdir(parents=True)
    records = []
    for step in range(1, steps + 1):
        record = {"step": step, "ntp_loss": 8.0 - step / 50 - better + 0.01 * seed, "lr": 1e-3, "grad_norm": 1.0}
        record |= {"tokens": step * 512, "tokens_per_second": 1000.0 + step, "memory_gib": 1.5}
        records.append(record | ({"nitp_loss": nitp(step)} if nitp else {}))
    _write(folder / "metrics.jsonl", records)
    measured = [step for step in (1, 25, 50, 75, 100) if step <= steps]
    states = ["hidden", "layer_0", "layer_1", "layer_2", *(["target", "projected"] if nitp else [])]
    geometry = [
        {"step": step, **{state: _state(10 + step / 10 + better + i, 0.3) for i, state in enumerate(states)}}
        for step in measured
    ]
    _write(folder / "geometry.jsonl", geometry)
    _write(
        folder / "validation_geometry.jsonl", [{"step": step, "hidden": _state(9 + better, 0.2)} for step in measured]
    )
    _write(folder / "validation.jsonl", [{"step": s, "ntp_loss": 7.9 - s / 50 - better} for s in measured])
    tables = SETTINGS | {name: {**SETTINGS.get(name, {}), **table} for name, table in settings.items()}
    tables["debug"] = {"seed": seed}
    if nitp:
        tables["nitp"] = {"weight": 1.0, "loss": "cosine"} | settings.get("nitp", {})
        tables["metrics"] = tables["metrics"] | {"run_name": "debug/nitp_debug"}
    (folder / "resolved.json").write_text(json.dumps(tables))
    return folder
