"""The three variants beside each other, on real steps of a small model."""

import dataclasses

import pytest
import torch
from helpers import PackedDataLoader
from overhead import measure
from overhead.variants import variant_configs

from nitp_titan.config import recipe
from nitp_titan.errors import UserError
from nitp_titan.sizing.model_size import count_model
from nitp_titan.training.trainer import load_config

DIM, LAYERS, VOCABULARY, SEQ_LEN = 96, 4, 4096, 128
CPU = recipe.find("cpu", "train_configs")


@pytest.fixture(scope="module")
def configs(assets):
    base = load_config(recipe.find("debug/nitp_debug", "recipes"), CPU)
    training = dataclasses.replace(base.training, local_batch_size=2, global_batch_size=2, seq_len=SEQ_LEN)
    return variant_configs(
        recipe.find("debug/nitp_debug", "recipes"), CPU, training=training, dataloader=PackedDataLoader.Config()
    )


@pytest.fixture(scope="module")
def result(configs):
    return measure.measure(configs, num_rounds=5, num_warmup=1)


def test_variants_need_a_nitp_recipe(assets):
    with pytest.raises(UserError, match=r"ntp_debug.toml: \[nitp\] weight = 0; the cost of NITP is measured with"):
        variant_configs(recipe.find("debug/ntp_debug", "recipes"), CPU)


def test_variants_differ_in_their_auxiliary_objective_alone(configs):
    ntp, nitp, mtp = (configs[name] for name in ("NTP", "NITP", "MTP"))
    assert ntp.nitp.weight == mtp.nitp.weight == 0 and nitp.nitp.weight > 0
    for name, config in configs.items():
        assert not (config.checkpoint.enable or config.validator.enable or config.geometry.enable), name
        same = dataclasses.replace(config, nitp=ntp.nitp, loss=ntp.loss, model_spec=ntp.model_spec)
        assert same == ntp


def test_mtp_is_a_layer_more_behind_a_projection_of_two_states(configs):
    sizes = {}
    with torch.device("meta"):
        for name in ("NTP", "MTP"):
            model = configs[name].model_spec.model.build()
            sizes[name] = sum(p.numel() for p in model.parameters())
            layer = sum(p.numel() for p in model.layers["0"].parameters())
    # Three norms beside the layer's own.
    assert sizes["MTP"] - sizes["NTP"] == layer + 2 * DIM * DIM + 3 * DIM


def test_counted_flops_are_six_per_parameter_that_multiplies_a_token(configs, result):
    with torch.device("meta"):
        counts = count_model(configs["NTP"].model_spec.model.build(), SEQ_LEN)
        mtp = configs["MTP"].model_spec.model.build()
        layer = sum(p.numel() for p in mtp.mtp_layers.parameters() if p.ndim == 2)
    variants = result["variants"]
    ntp = variants["NTP"]["matmul_flops"]
    # The first layer's inputs need no gradient only where they are tokens: everything is multiplied three times.
    assert ntp == counts.flops
    assert variants["NITP"]["matmul_flops"] - ntp == 72 * DIM**2
    assert variants["MTP"]["matmul_flops"] - ntp == 6 * (layer + VOCABULARY * DIM)


def test_every_round_is_timed_and_the_baseline_s_ratio_is_one(result):
    assert list(result["variants"]) == ["NTP", "NITP", "MTP"]
    assert (result["rounds"], result["tokens_per_step"]) == (5, 2 * SEQ_LEN)
    baseline = result["variants"]["NTP"]["ratio"]
    assert baseline["median"] == 1.0 and baseline["interval"] == (1.0, 1.0)
    for variant in result["variants"].values():
        low, high = variant["seconds"]["quartiles"]
        assert 0 < low <= variant["seconds"]["median"] <= high
        assert variant["tokens_per_second"] == pytest.approx(2 * SEQ_LEN / variant["seconds"]["median"])
        assert variant["mfu"] is None


def test_nitp_keeps_little_and_mtp_a_second_vocabulary_of_logits(configs, result):
    peaks = {name: variant["peak_bytes"] for name, variant in result["variants"].items()}
    chunks = {name: variant["chunks"] for name, variant in result["variants"].items()}
    assert chunks == {"NTP": 8, "NITP": 8, "MTP": 1}
    assert peaks["NTP"] <= peaks["NITP"] < 1.02 * peaks["NTP"]
    logits = 4 * 2 * SEQ_LEN * VOCABULARY
    assert peaks["MTP"] > peaks["NTP"] + logits
