"""With a seed and `debug.deterministic` a run on the CPU gives the same numbers twice, bit for bit."""

import pytest
import torch
from helpers import make_config, parameters

from nitp_titan.step_files import read_records

FILES = ("metrics.jsonl", "validation.jsonl", "geometry.jsonl")
# What the clock and the machine say.
_TIMES = ("time", "second", "memory", "mfu", "flops", "throughput", "tps", "left")


@pytest.fixture(autouse=True)
def global_settings(monkeypatch):
    """What a deterministic run sets for the whole process is taken back."""
    monkeypatch.setattr("torchtitan.trainer.time.sleep", lambda seconds: None)
    fill, cudnn = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.deterministic
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.deterministic = fill, cudnn


def _run(folder, recipe: str, seed: int):
    """Numbers of a short run as the CPU train config has it, in small batches, by file; and its final weights."""
    config = make_config(
        folder,
        recipe=recipe,
        generated_data=False,
        training={"steps": 4, "local_batch_size": 4, "global_batch_size": 8, "max_norm": 1.0},
        geometry={"enable": True, "layers": True, "interval": 2},
        validator={"enable": True, "freq": 4, "steps": 1},
        debug={"deterministic": True, "seed": seed},
    )
    trainer = config.build()
    assert torch.are_deterministic_algorithms_enabled()
    trainer.train()
    trainer.close()
    records = {name: read_records(folder / name) for name in FILES}
    numbers = {
        name: [{key: value for key, value in record.items() if not _is_time(key)} for record in found]
        for name, found in records.items()
    }
    return numbers, parameters(trainer)


def _is_time(key: str) -> bool:
    return any(word in key for word in _TIMES)


@pytest.mark.parametrize("recipe", ["debug/nitp_debug", "debug/nitp_moe_debug"])
def test_the_same_seed_gives_the_same_numbers_and_weights_and_another_seed_others(assets, tmp_path, recipe):
    numbers, weights = {}, {}
    for name, seed in (("first", 42), ("again", 42), ("other", 43)):
        numbers[name], weights[name] = _run(tmp_path / name, recipe, seed)
    assert numbers["first"] == numbers["again"]
    assert weights["first"].keys() == weights["again"].keys()
    for name, weight in weights["first"].items():
        assert torch.equal(weight, weights["again"][name]), name
    for file in FILES:
        assert numbers["first"][file] != numbers["other"][file], file
    for records, others in zip(numbers["first"]["metrics.jsonl"], numbers["other"]["metrics.jsonl"], strict=True):
        for key in ("ntp_loss", "nitp_loss", "grad_norm"):
            assert records[key] != others[key], key
