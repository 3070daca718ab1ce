"""Models without an exact home, damaged and foreign checkpoints."""

import os
import shutil
from pathlib import Path

import pytest
from exported import TRAINING
from helpers import export_of, make_config, saved_run, with_expert_bias

from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.errors import UserError
from nitp_titan.models.settings import ModelConfig


@pytest.mark.parametrize(
    "model, reason",
    {
        "qwen3/debug_moe": "Qwen3MoeForCausalLM: 'layers.0.moe.expert_bias_E' has no counterpart there and is not "
        "zero; load balancing has moved it (4 such tensors)",
        "gpt_oss/debug": "GptOssForCausalLM: 'layers.0.moe.expert_bias_E' has no counterpart there and is not zero",
        "odd_models/moe_raw_weights": "Ernie4_5_MoeForCausalLM: the weights of a token's experts are not normalised",
        "odd_models/moe_sigmoid": "Ernie4_5_MoeForCausalLM: it routes with a sigmoid",
        "odd_models/moe_yarn": "Ernie4_5_MoeForCausalLM: its rotary embeddings are scaled",
        "odd_models/deepseek_v3_softmax": "DeepseekV3ForCausalLM: it routes with a softmax",
        "odd_models/deepseek_v3_eps": "DeepseekV3ForCausalLM: the epsilon of its latent norms is 1e-05, there it is "
        "always 1e-06",
        "odd_models/llama_unlike_layers": "LlamaForCausalLM: its layers differ in the epsilon of their norms",
    }.items(),
)
def test_what_has_no_exact_home_is_refused_with_the_reason(assets, tmp_path, model, reason):
    family, _, flavor = model.partition("/")
    settings = {"model": ModelConfig(family=family, flavor=flavor), "training": {**TRAINING, "steps": 1}}
    saved_run(tmp_path / "run", change=with_expert_bias, generated_data=False, **settings)
    with pytest.raises(UserError) as refused:
        export_of(tmp_path / "run")
    assert f"this model has no exact home in {reason}" in str(refused.value)


def test_a_last_save_that_would_lose_tensors_is_refused_before_training(assets, tmp_path):
    settings = {"last_save_in_hf": True, "last_save_model_only": True, "enable": True}
    for model, refused in {"qwen3/debug_moe": True, "gpt_oss/debug": True, "moe/debug": False}.items():
        family, _, flavor = model.partition("/")
        config = make_config(tmp_path / family, model=ModelConfig(family=family, flavor=flavor), checkpoint=settings)
        if not refused:
            config.build().close()
            continue
        message = "last_save_in_hf = true, but .*: 'layers.0.moe.expert_bias_E' has no counterpart there"
        with pytest.raises(UserError, match=message):
            config.build()
        assert not (tmp_path / family).exists()


def _copy(runs, tmp_path) -> Path:
    shutil.copytree(runs("llama3/debug")[0], tmp_path / "run")
    return tmp_path / "run"


def _other_recipe(old: str, new: str):
    def change(run: Path):
        resolved = run / "resolved.toml"
        assert old in resolved.read_text()
        resolved.write_text(resolved.read_text().replace(old, new))

    return change


def _cut_data(run: Path):
    (data,) = (run / "checkpoint/step-3").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:1000])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda run: (run / "resolved.toml").unlink(), "holds resolved.toml, which says what model"),
        (lambda run: (run / "checkpoint/step-3/.metadata").write_bytes(b"?"), "step-3/.metadata is damaged"),
        (lambda run: shutil.rmtree(run / "checkpoint"), "holds no complete checkpoint"),
        (lambda run: os.rename(run, run.parent / "runs"), "run is not a folder. Did you mean '"),
        (_cut_data, "step-3/__0_0.distcp has 1,000 bytes instead of "),
        (
            _other_recipe('flavor = "debug"', 'flavor = "150M"'),
            "'tok_embeddings.weight' is [4096, 96], but the model needs [32000, 768]",
        ),
        (_other_recipe("assets/stdlib", "assets/gone"), "assets/gone holds no tokenizer.json"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_one_clear_error(runs, tmp_path, change, message):
    run = _copy(runs, tmp_path)
    change(run)
    with pytest.raises(UserError) as refused:
        export_of(run).write(tmp_path / "hf")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".hf*"))


def test_an_interrupted_checkpoint_is_passed_over(runs, tmp_path):
    run = _copy(runs, tmp_path)
    (run / "checkpoint/step-3/.metadata").unlink()
    assert Checkpoint(run).step == 2
    with pytest.raises(UserError, match="step-3 has no .metadata: its writing was interrupted"):
        Checkpoint(run / "checkpoint/step-3")
