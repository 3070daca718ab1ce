"""Exported models against the training model, and transformers against our logs."""

import json
import math

import pytest
import torch
from exported import export, LENGTH, load, real_text, TRAINING, training_logits
from helpers import export_of, IGNORE, saved_run
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.models.settings import ModelConfig
from nitp_titan.step_files import read_records

MODELS = {
    "llama3/debug": "LlamaForCausalLM",
    "llama3/debug_untied": "LlamaForCausalLM",
    "moe/debug": "Ernie4_5_MoeForCausalLM",
    "qwen3/debug": "Qwen3ForCausalLM",
    "qwen3/debug_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3/debug": "DeepseekV3ForCausalLM",
    "gpt_oss/debug": "GptOssForCausalLM",
    "odd_models/llama_scaled": "LlamaForCausalLM",
    "odd_models/llama_yarn": "LlamaForCausalLM",
    "odd_models/qwen3_yarn": "Qwen3ForCausalLM",
    "odd_models/deepseek_v3_yarn": "DeepseekV3ForCausalLM",
    "odd_models/gpt_oss_yarn": "GptOssForCausalLM",
}


@pytest.mark.parametrize("model", MODELS)
def test_transformers_computes_the_same_logits_and_greedy_tokens(runs, tmp_path, model):
    folder, trainer = runs(model)
    exported = load(export(folder, tmp_path / "hf"))
    assert type(exported).__name__ == MODELS[model]
    ids = real_text(trainer.tokenizer)
    expected = training_logits(trainer, ids)
    assert expected.abs().max() > 0.5
    with torch.no_grad():
        assert (exported(ids).logits - expected).abs().max() < 1e-4
    prompt, generated = ids[:, :16], ids[:, :16]
    for _ in range(24):
        generated = torch.cat([generated, training_logits(trainer, generated)[:, -1:].argmax(-1)], dim=1)
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    assert exported.generate(prompt, attention_mask=torch.ones_like(prompt), **options).tolist() == generated.tolist()


def test_the_expert_bias_decides_who_is_chosen(runs, tmp_path):
    """Parity with a bias would show nothing if the bias made no difference."""
    folder, trainer = runs("moe/debug")
    exported = load(export(folder, tmp_path / "hf"))
    ids = real_text(trainer.tokenizer)
    with torch.no_grad():
        before = exported(ids).logits
        for name, parameter in exported.named_parameters():
            if "e_score_correction_bias" in name:
                assert parameter.abs().max() > 0.1
                parameter.zero_()
        assert (exported(ids).logits - before).abs().max() > 1e-2


def _third_batch(trainer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    settings = {"dp_world_size": 1, "dp_rank": 0, "seq_len": LENGTH, "local_batch_size": 2}
    batches = iter(trainer.config.dataloader.build(tokenizer=trainer.tokenizer, **settings))
    inputs, labels = [next(batches) for _ in range(3)][2]
    assert (inputs["positions"] == 0).sum() > 2, "documents begin within the sequences"
    return inputs["input"], inputs["positions"], labels


@pytest.mark.parametrize("model", ["llama3/debug", "llama3/debug_untied", "qwen3/debug", "moe/debug"])
def test_both_losses_follow_from_transformers_and_the_checkpoints_projector(runs, tmp_path, model):
    """The third step's losses, logged in training, recomputed from what was saved after the second.

    Nothing of this project is used but the export and the batch: transformers' hidden states, three matrices.
    """
    folder, trainer = runs(model)
    checkpoint = Checkpoint(folder / "checkpoint/step-2")
    exported = load(export(checkpoint.folder, tmp_path / "hf"))
    w1, w2, w3 = checkpoint.load(f"nitp.projector.w{number}.weight" for number in (1, 2, 3)).values()
    ids, positions, labels = _third_batch(trainer)
    with torch.no_grad():
        # Without a mask, transformers keeps packed documents apart by their positions.
        output = exported(ids, position_ids=positions, output_hidden_states=True, use_cache=False)
        ntp = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        z, h = output.hidden_states[2], output.hidden_states[-1]
        projected = (torch.nn.functional.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
        cosine = torch.cosine_similarity(projected[:, :-1], z[:, 1:], dim=-1)
        valid = (positions[:, 1:] == positions[:, :-1] + 1) & (labels[:, :-1] != IGNORE)
        nitp = (1 - cosine)[valid].mean()
    logged = read_records(folder / "metrics.jsonl")[2]
    assert trainer.config.nitp.target_layer == 2
    assert ntp.item() == pytest.approx(logged["ntp_loss"], abs=1e-5)
    assert nitp.item() == pytest.approx(logged["nitp_loss"], abs=1e-5)


def _text_of_length(document: str, length: int, tokenizer) -> str:
    """The beginning of a document that has ``length`` tokens, EOS included and BOS not."""
    ends = range(length, 20 * length)
    return next(document[:end] for end in ends if len(tokenizer.encode(document[:end], add_eos=True)) == length + 1)


@pytest.mark.parametrize("model", ["llama3/debug", "moe/debug"])
def test_the_evaluation_of_a_text_is_the_validation_of_training(assets, tmp_path, model):
    """Two paths to one number: TorchTitan's validator on the training model, the exported model in transformers."""
    from nitp_titan.evaluation import perplexity
    from nitp_titan.evaluation.models import LoadedModel

    family, _, flavor = model.partition("/")
    text, tokenizer = tmp_path / "text.jsonl", HuggingFaceTokenizer(tokenizer_path=str(assets))
    document = json.loads((assets / "validation.jsonl").read_text().splitlines()[0])["text"]
    # They just fill four sequences of 128, since training drops what is left over.
    documents = [_text_of_length(document, length, tokenizer) for length in (50, 300, 162)]
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in documents))
    data = TextDataLoader.Config(dataset_path=str(text), infinite=False)
    trainer = saved_run(
        tmp_path / "run",
        model=ModelConfig(family=family, flavor=flavor),
        generated_data=False,
        training={**TRAINING, "seq_len": 128},
        validator={"enable": True, "steps": -1, "dataloader": data},
    )
    trainer.validator.validate(trainer.model_parts, 3)
    *_, logged = read_records(tmp_path / "run/validation.jsonl")
    folder = export(tmp_path / "run", tmp_path / "hf")
    scores = perplexity.measure(text, "text", 128, LoadedModel(str(folder), load(folder), None, 2))
    assert scores["cross_entropy"].value == pytest.approx(logged["ntp_loss"], abs=2e-6)
    num_bytes, num_tokens = sum(len(part.encode()) for part in documents), 4 * 128
    bits = logged["ntp_loss"] * num_tokens / math.log(2) / num_bytes
    assert scores["bits_per_byte"].value == pytest.approx(bits, abs=2e-6)


def test_nitp_costs_nothing_at_inference(assets, tmp_path):
    """Same tensors, sizes and FLOPs as the NTP baseline."""
    models = {}
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        saved_run(folder, nitp={"weight": weight}, training=TRAINING, generated_data=False)
        done = export_of(folder).write(tmp_path / f"hf-{weight}")
        assert len(done.left_out) == (3 if weight else 0)
        models[weight] = load(done.folder)
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in models.values()]
    assert shapes[0] == shapes[1]
    flops = []
    for model in models.values():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, LENGTH, dtype=torch.int64))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    ours, theirs = ((tmp_path / f"hf-{weight}/model.safetensors").stat().st_size for weight in models)
    assert ours == theirs
    configs = [(tmp_path / f"hf-{weight}/config.json").read_text() for weight in models]
    assert configs[0] == configs[1]
