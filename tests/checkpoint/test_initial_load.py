"""Runs that start from another model: what is loaded, what is new, what is refused; round trips."""

import hashlib
import itertools
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import export_of, make_config, parameters, saved_run, with_expert_bias, without_expert_bias
from safetensors.torch import load_file, save_file
from torchtitan.components.optimizer import default_adamw

from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.errors import UserError
from nitp_titan.models.settings import ModelConfig

TRAINING = {"seq_len": 128, "local_batch_size": 2, "global_batch_size": 2, "steps": 3, "max_norm": 1e9}
NTP, NITP = {"weight": 0.0}, {"weight": 20.0}


def _settings(model: str = "llama3/debug", **sections) -> dict:
    family, _, flavor = model.partition("/")
    return {
        "model": ModelConfig(family=family, flavor=flavor),
        "training": TRAINING,
        "generated_data": False,
        "nitp": NTP,
        **sections,
    }


@pytest.fixture(scope="module")
def ntp(assets, tmp_path_factory):
    """Run folder of a plain NTP run of three steps, and its trainer."""
    folder = tmp_path_factory.mktemp("ntp")
    return folder, saved_run(folder, **_settings())


def _start(folder: Path, path: Path, *, model_only=True, in_hf=False, **sections):
    """A trainer that has loaded its initial checkpoint."""
    checkpoint = {
        "enable": True,
        "initial_load_path": str(path),
        "initial_load_model_only": model_only,
        "initial_load_in_hf": in_hf,
        "last_save_model_only": False,
    }
    trainer = make_config(folder, **{**_settings(nitp=NITP), "checkpoint": checkpoint, **sections}).build()
    trainer.checkpointer.load(step=-1)
    return trainer


def _optimizer_states(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.optimizers.state_dict().items() if name.startswith("state.")}


def test_an_ntp_checkpoint_continues_with_nitp_and_its_optimizer(ntp, tmp_path, caplog):
    folder, before = ntp
    with caplog.at_level(logging.INFO):
        changed = {"training": {**TRAINING, "steps": 5}, "optimizer": default_adamw(lr=2e-3, weight_decay=0.3)}
        trainer = _start(tmp_path / "nitp", folder, model_only=False, **changed)
    assert trainer.step == 3
    states, weights = _optimizer_states(trainer), parameters(trainer)
    saved_states, saved_weights = _optimizer_states(before), parameters(before)
    assert saved_weights.keys() == {name for name in weights if not name.startswith("nitp.")}
    assert all(torch.equal(weights[name], saved_weights[name]) for name in saved_weights)
    assert any(value.abs().max() > 0 for name, value in saved_states.items() if name.endswith("exp_avg"))
    assert all(torch.equal(states[name], saved_states[name]) for name in saved_states)
    # The projector is the one that a fresh NITP run of this seed has, and Adam has not seen it yet.
    fresh = parameters(make_config(tmp_path / "fresh", **_settings(nitp=NITP)).build())
    projector = [name for name in weights if name.startswith("nitp.")]
    assert len(projector) == 3
    assert all(torch.equal(weights[name], fresh[name]) for name in projector)
    assert all(states[f"state.{name}.{key}"].count_nonzero() == 0 for name in projector for key in _ADAM)
    (message,) = [record.message for record in caplog.records if record.message.startswith("Starting from")]
    assert message == (
        f"Starting from {folder}/checkpoint/step-3: 39 tensors of the model, with the states of optimizer, schedule "
        "and data; new, as initialised: nitp.projector.w1.weight, nitp.projector.w2.weight, nitp.projector.w3.weight"
    )
    # The recipe's schedule and settings at the checkpoint's step: five steps do not decay before the fifth.
    (optimizer,) = trainer.optimizers
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]
    # The next batch is the one that would have followed, and the step works.
    inputs, labels = next(trainer.batch_generator(trainer.dataloader))
    options = {"dp_world_size": 1, "dp_rank": 0, "seq_len": 128, "local_batch_size": 2}
    fourth = list(itertools.islice(before.config.dataloader.build(tokenizer=before.tokenizer, **options), 4))[3]
    assert torch.equal(inputs["input"], fourth[0]["input"])
    trainer.step = 4
    trainer.train_step(iter([(inputs, labels)]))
    moved = parameters(trainer)
    assert all(not torch.equal(moved[name], weights[name]) for name in projector)
    trainer.close()


_ADAM = ("step", "exp_avg", "exp_avg_sq")


def test_the_model_alone_starts_at_step_0_with_a_fresh_optimizer(ntp, tmp_path):
    folder, before = ntp
    trainer = _start(tmp_path / "nitp", folder / "checkpoint/step-2")
    assert trainer.step == 0
    saved = Checkpoint(folder / "checkpoint/step-2")
    weights = parameters(trainer)
    for name, value in saved.load(name for name in saved.tensors).items():
        assert torch.equal(weights.get(name, value), value), name
    assert all(value.count_nonzero() == 0 for value in _optimizer_states(trainer).values())
    trainer.close()


def test_an_nitp_checkpoint_continues_as_ntp(tmp_path, assets, caplog):
    saved_run(tmp_path / "nitp", **_settings(nitp=NITP))
    with caplog.at_level(logging.INFO):
        trainer = _start(tmp_path / "ntp", tmp_path / "nitp", nitp=NTP)
    (message,) = [record.message for record in caplog.records if record.message.startswith("Starting from")]
    assert "not used: nitp.projector.w1.weight, nitp.projector.w2.weight, nitp.projector.w3.weight" in message
    saved = Checkpoint(tmp_path / "nitp")
    assert torch.equal(parameters(trainer)["norm.weight"], saved.load(["norm.weight"])["norm.weight"])
    trainer.close()


def test_a_run_with_checkpoints_of_its_own_resumes_from_these(ntp, tmp_path):
    folder, _ = ntp
    shutil.copytree(folder, tmp_path / "start")
    first = _start(tmp_path / "run", tmp_path / "start")
    first.step = 1
    first.train_step(first.batch_generator(first.dataloader))
    first.checkpointer.save(1, last_step=True)
    first.close()
    shutil.rmtree(tmp_path / "start")
    second = _start(tmp_path / "run", tmp_path / "start")
    assert second.step == 1
    assert all(torch.equal(value, parameters(second)[name]) for name, value in parameters(first).items())
    second.close()


def _digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "model, change",
    {
        "llama3/debug": None,
        "llama3/debug_untied": None,
        "moe/debug": with_expert_bias,
        "qwen3/debug": None,
        "qwen3/debug_moe": without_expert_bias,
        "deepseek_v3/debug": with_expert_bias,
        "gpt_oss/debug": without_expert_bias,
    }.items(),
)
def test_export_import_export_is_bit_identical(assets, tmp_path, caplog, model, change):
    saved_run(tmp_path / "run", change=change, **_settings(model, nitp=NITP))
    export_of(tmp_path / "run", max_shard_size="1MB").write(tmp_path / "first")
    with caplog.at_level(logging.INFO):
        trainer = _start(tmp_path / "again", tmp_path / "first", in_hf=True, **_settings(model, nitp=NITP))
    (message,) = [record.message for record in caplog.records if record.message.startswith("Starting from")]
    assert "new, as initialised: " in message and "nitp.projector.w1.weight" in message
    assert ("expert_bias_E" in message) == (change is without_expert_bias)
    trainer.checkpointer.save(0, last_step=True)
    trainer.close()
    export_of(tmp_path / "again", max_shard_size="1MB").write(tmp_path / "second")
    first, second = _digest(tmp_path / "first"), _digest(tmp_path / "second")
    assert first == second and len(first) > 1
    assert (tmp_path / "first/config.json").read_text() == (tmp_path / "second/config.json").read_text()


def test_a_model_that_transformers_saved_is_loaded(assets, tmp_path):
    """Not our file: transformers' own initial weights in bfloat16, in shards of its own."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=4096)
    config = LlamaConfig(**shape, intermediate_size=256, rms_norm_eps=1e-5, tie_word_embeddings=True)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="500KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    trainer = _start(tmp_path / "run", tmp_path / "hf", in_hf=True)
    (ours,) = trainer.model_parts
    ours.eval()._skip_lm_head = False
    ids = torch.arange(100)[None]
    masks = ours.get_attention_masks(ids)
    with torch.no_grad():
        assert (ours(ids, positions=ids, attention_masks=masks) - model(ids).logits).abs().max() < 1e-4
    trainer.close()


@pytest.fixture(scope="module")
def exported(ntp, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    export_of(ntp[0]).write(folder)
    return folder


def _edit(**changes):
    def change(folder: Path):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _without(*keys):
    def change(folder: Path):
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in settings.items() if key not in keys}))

    return change


def _tensors(change):
    def rewrite(folder: Path):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def _cut(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


_BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    "change, message",
    [
        (_edit(model_type="qwen2"), "config.json: model_type = 'qwen2', but the recipe's model has 'llama'"),
        (_edit(rms_norm_eps=1e-6), "config.json: rms_norm_eps = 1e-06, but the recipe's model has 1e-05"),
        (_edit(rope_parameters={"rope_type": "default", "rope_theta": 1e4}), "rope_theta = 10000.0, but the recipe's"),
        (_edit(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "rope_type = 'linear', but"),
        (_edit(tie_word_embeddings=False), "tie_word_embeddings = False, but the recipe's model has True"),
        (_tensors(lambda t: t.update({_BIAS: torch.zeros(96)})), f"has a tensor '{_BIAS}', for which the recipe's"),
        (_tensors(lambda t: t.pop("model.norm.weight")), "has no tensor 'model.norm.weight'"),
        (_tensors(lambda t: t.update({"model.norm.weight": torch.ones(95)})), "'model.norm.weight' is [95], but the"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors"),
        (_cut, "model.safetensors cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json is not JSON: it holds no object"),
        (_without("rms_norm_eps"), "rms_norm_eps = 1e-06 (not set: the default of 'llama'), but the recipe's model"),
        (
            _without("rope_theta", "rope_parameters"),
            "rope_parameters rope_theta = 10000.0 (not set: the default of 'llama'), but the recipe's model has 500000",
        ),
        (lambda folder: folder.rename(folder.parent / "models"), "model is not a folder. Did you mean"),
    ],
)
def test_a_hugging_face_model_that_does_not_fit_is_refused_before_anything_is_built(
    exported, tmp_path, change, message
):
    shutil.copytree(exported, tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(UserError) as refused:
        _start(tmp_path / "run", tmp_path / "model", in_hf=True)
    assert str(refused.value).startswith("[checkpoint] initial_load_path: ") and message in str(refused.value)
    assert (refused.value.table, refused.value.key) == ("checkpoint", "initial_load_path")
    assert not (tmp_path / "run").exists()


def test_an_untied_model_needs_the_unembedding_of_its_own(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "model")
    _edit(tie_word_embeddings=None)(tmp_path / "model")
    with pytest.raises(UserError, match="has no tensor 'lm_head.weight', .* [(]its embeddings are tied"):
        _start(tmp_path / "run", tmp_path / "model", in_hf=True, **_settings("llama3/debug_untied"))


@pytest.mark.parametrize(
    "sections, message",
    [
        (_settings("odd_models/llama_wider"), "'layers.0.feed_forward.w1.weight' is [256, 96], but the model needs"),
        (_settings("qwen3/debug"), "has no tensor 'layers.0.attention.q_norm.weight', which the model needs"),
        (_settings("moe/debug"), "has a tensor 'layers.1.feed_forward.w1.weight', for which the model has no place"),
        ({"model_only": False}, "has done 3 steps and [training] steps = 3: there is nothing left to train"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(ntp, tmp_path, sections, message):
    with pytest.raises(UserError) as refused:
        _start(tmp_path / "run", ntp[0], **sections)
    assert message in str(refused.value)


def test_states_that_were_not_saved_cannot_be_asked_for(tmp_path, assets, ntp):
    trainer = _start(tmp_path / "run", ntp[0], checkpoint={"enable": True, "last_save_model_only": True})
    trainer.checkpointer.save(3, last_step=True)
    trainer.close()
    with pytest.raises(UserError, match="holds a model only; set initial_load_model_only = true"):
        _start(tmp_path / "next", tmp_path / "run", model_only=False, training={**TRAINING, "steps": 5})


@pytest.mark.parametrize("name", ["step-best", "latest", "a link"])
def test_a_renamed_or_linked_checkpoint_is_resumed_from(ntp, tmp_path, name):
    shutil.copytree(ntp[0], tmp_path / "ntp")
    steps = tmp_path / "ntp/checkpoint"
    if name == "step-best":
        (steps / "step-3").rename(steps / name)
    else:
        (steps / name).symlink_to("step-3")
    trainer = _start(tmp_path / "run", steps / name, model_only=False, training={**TRAINING, "steps": 5})
    trainer.close()
    assert trainer.step == 3 and Checkpoint(steps / name).step == 3
    starts = json.loads((tmp_path / "run/resolved.json").read_text())
    assert starts["checkpoint"]["initial_load_path"] == str(steps / name)


def test_a_model_alone_in_a_renamed_folder_starts_a_run_and_says_that_it_has_no_step(ntp, tmp_path):
    trainer = _start(tmp_path / "run", ntp[0], checkpoint={"enable": True, "last_save_model_only": True})
    trainer.checkpointer.save(3, last_step=True)
    trainer.close()
    best = (tmp_path / "run/checkpoint/step-3").rename(tmp_path / "run/checkpoint/best")
    _start(tmp_path / "next", best).close()
    checkpoint = Checkpoint(best)
    with pytest.raises(UserError, match=r"best does not say its step: name it step-N\."):
        _ = checkpoint.step


def test_a_remote_ntp_checkpoint_starts_a_run_with_nitp(ntp, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    remote = f"file://{ntp[0]}/checkpoint/step-3"
    trainer = _start(tmp_path / "run", remote)
    trainer.close()
    assert f"Starting from {remote}: " in caplog.text and "new, as initialised: nitp.projector" in caplog.text
    for name, value in parameters(ntp[1]).items():
        assert torch.equal(parameters(trainer)[name], value)
    with pytest.raises(UserError, match="initial_load_path: nowhere://x/step-1 cannot be read: Protocol not known"):
        _start(tmp_path / "other", "nowhere://x/step-1")
