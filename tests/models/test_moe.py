"""The mixture-of-experts family: training on CPU, balanced experts, FLOPs against torch's own counter."""

import pytest
import torch
from helpers import make_config, train
from torch.utils.flop_counter import FlopCounterMode

from nitp_titan.config.trained import trained
from nitp_titan.sizing import model_size
from nitp_titan.step_files import read_records


@pytest.mark.parametrize("recipe", ["debug/ntp_moe_debug", "debug/nitp_moe_debug"])
def test_the_debug_model_learns_on_one_rank(tmp_path, recipe):
    training = {"steps": 30, "local_batch_size": 4, "global_batch_size": 4, "max_norm": 1.0}
    train(make_config(tmp_path, recipe=recipe, training=training, lr_scheduler={"warmup_steps": 5}))
    records = read_records(tmp_path / "metrics.jsonl")
    assert records[0]["ntp_loss"] == pytest.approx(8.35, abs=0.1)  # ln 4096, and the noise of the first weights.
    assert records[-1]["ntp_loss"] < records[0]["ntp_loss"] - 1
    if "nitp_moe" in recipe:
        assert records[-1]["nitp_loss"] < 0.5 * records[0]["nitp_loss"]


def _expert_loads(folder, coefficient) -> torch.Tensor:
    """Tokens of each expert, [layers, steps, experts], over 50 steps of the debug recipe on real text."""
    training = {"steps": 50, "local_batch_size": 8, "global_batch_size": 8, "max_norm": 1.0}
    settings = {"training": training, "lr_scheduler": {"warmup_steps": 64, "total_steps": 320}}
    config = make_config(folder, recipe="debug/nitp_moe_debug", generated_data=False, **settings)
    moes = [layer.moe for layer in config.model_spec.model.layers if layer.moe is not None]
    for moe in moes:
        moe.load_balance_coeff = coefficient
    trainer = config.build()
    loads: dict[str, list[torch.Tensor]] = {}
    for name, layer in trainer.model_parts[0].layers.items():
        if layer.moe_enabled:
            seen = loads.setdefault(name, [])
            layer.moe.router.register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(torch.bincount(output[1].flatten(), minlength=16))
            )
    batches = trainer.batch_generator(trainer.dataloader)
    for step in range(1, 51):
        trainer.step = step
        trainer.train_step(batches)
    trainer.close()
    return torch.stack([torch.stack(seen) for seen in loads.values()]).double()


def _imbalance(loads: torch.Tensor) -> torch.Tensor:
    """The busiest expert's load over the mean, per layer."""
    total = loads.sum(1)
    return total.amax(1) / total.mean(1)


def test_experts_stay_balanced_over_50_steps_and_without_balancing_do_not(assets, tmp_path):
    balanced = _expert_loads(tmp_path / "balanced", 1e-2)
    assert balanced.shape == (3, 50, 16)
    assert (_imbalance(balanced) < 1.5).all()
    for start in range(0, 50, 10):
        assert (_imbalance(balanced[:, start : start + 10]) < 3).all(), start
    # Top 4 of 16: a router that always takes the same four has an imbalance of 4.
    unbalanced = _expert_loads(tmp_path / "unbalanced", None)
    assert (_imbalance(unbalanced[:, 40:]) > 3.5).all()


def _grouped_mm_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    """torch counts no grouped product: rows x inner x columns, whichever operand the groups are cut from."""
    rows, inner = a_shape[-2:]
    return 2 * rows * inner * b_shape[-1]


@pytest.mark.parametrize("recipe", ["debug/nitp_debug", "debug/nitp_moe_debug"])
def test_counted_flops_are_those_of_torchs_counter(tmp_path, recipe):
    """One step's matrix multiplications, counted as they run, are those counted from shapes."""
    config = make_config(tmp_path, recipe=recipe)
    seq_len, batch = config.training.seq_len, config.training.local_batch_size
    trainer = config.build()
    counted = model_size.count_model(trainer.model_parts[0], seq_len)
    batches = trainer.batch_generator(trainer.dataloader)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_mm_flops}) as counter:
        trainer.step = 1
        trainer.train_step(batches)
    trainer.close()
    by_operator = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for operator, flops in by_operator.items() if "attention" in operator)
    tokens = batch * seq_len
    expected = (counted.flops + counted.nitp_flops) * tokens
    assert sum(by_operator.values()) - attention == pytest.approx(expected, rel=2e-3)


def test_activated_parameters_are_all_but_the_idle_experts(tmp_path):
    config = make_config(tmp_path, recipe="debug/ntp_moe_debug")
    with torch.device("meta"):
        model = trained(config).model_spec.model.build()
    counted = model_size.count_model(model, 128)
    # 3 MoE layers, 12 of 16 experts idle, three matrices of 96 x 48.
    assert counted.parameters - counted.activated_parameters == 3 * 12 * 3 * 96 * 48
    assert counted.attention_flops == 4 * 12 * 96 * 128
    assert counted.projector_parameters == counted.nitp_flops == 0
