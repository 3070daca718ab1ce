"""Exported models against the training model, transformers against our logs, refusals, memory."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import IGNORE, make_config, saved_run, with_expert_bias, without_expert_bias
from processes import PROJECT
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from nitp_titan.checkpoint import Checkpoint
from nitp_titan.config import ModelConfig, UserError
from nitp_titan.data import TextDataLoader
from nitp_titan.hf.export import Export, MAX_SHARD_SIZE
from nitp_titan.metrics_file import read_records
from nitp_titan.models import build_model_spec

# Longer than GPT-OSS's sliding window of 128.
LENGTH = 192
TRAINING = {"seq_len": LENGTH, "local_batch_size": 2, "global_batch_size": 2, "steps": 3, "max_norm": 1e9}


@pytest.fixture(scope="module")
def runs(assets, tmp_path_factory):
    """Saved runs by model, each trained when it is first asked for: (folder, trainer)."""
    made = {}
    text = tmp_path_factory.mktemp("text") / "paragraphs.jsonl"
    documents = [json.loads(line)["text"] for line in (assets / "validation.jsonl").read_text().splitlines()]
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n\n")]
    text.write_text("".join(json.dumps({"text": paragraph[:200]}) + "\n" for paragraph in paragraphs))

    def run(model: str):
        if model not in made:
            family, _, flavor = model.partition("/")
            folder = tmp_path_factory.mktemp("run")
            zeroed = model in ("qwen3/debug_moe", "gpt_oss/debug", "odd_models/gpt_oss_yarn")
            settings = {
                "model": ModelConfig(family=family, flavor=flavor),
                "training": TRAINING,
                "generated_data": False,
                "dataloader": {"dataset_path": str(text)},
                "nitp": {"weight": 20.0},
            }
            change = without_expert_bias if zeroed else with_expert_bias
            made[model] = folder, saved_run(folder, change=change, **settings)
        return made[model]

    return run


def _export(folder: Path, out: Path, **options) -> Path:
    Export(Checkpoint(folder), **options).write(out)
    return out


def _load(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers.models.")
    return model.eval()


def _real_text(tokenizer) -> torch.Tensor:
    """Token ids of a document, [1, LENGTH]."""
    document = json.loads((PROJECT / "assets/stdlib/validation.jsonl").read_text().splitlines()[0])
    return torch.tensor([tokenizer.encode(document["text"], add_bos=True, add_eos=False)[:LENGTH]])


@torch.no_grad()
def _training_logits(trainer, ids: torch.Tensor) -> torch.Tensor:
    (model,) = trainer.model_parts
    model.eval()._skip_lm_head = False
    positions = torch.arange(ids.shape[1])[None]
    return model(ids, positions=positions, attention_masks=model.get_attention_masks(positions))


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
    exported = _load(_export(folder, tmp_path / "hf"))
    assert type(exported).__name__ == MODELS[model]
    ids = _real_text(trainer.tokenizer)
    expected = _training_logits(trainer, ids)
    assert expected.abs().max() > 0.5
    with torch.no_grad():
        assert (exported(ids).logits - expected).abs().max() < 1e-4
    prompt, generated = ids[:, :16], ids[:, :16]
    for _ in range(24):
        generated = torch.cat([generated, _training_logits(trainer, generated)[:, -1:].argmax(-1)], dim=1)
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    assert exported.generate(prompt, attention_mask=torch.ones_like(prompt), **options).tolist() == generated.tolist()


def test_the_expert_bias_decides_who_is_chosen(runs, tmp_path):
    """Parity with a bias would show nothing if the bias made no difference."""
    folder, trainer = runs("moe/debug")
    exported = _load(_export(folder, tmp_path / "hf"))
    ids = _real_text(trainer.tokenizer)
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
    exported = _load(_export(checkpoint.folder, tmp_path / "hf"))
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


def test_the_tokenizer_is_that_of_training(runs, tmp_path):
    from transformers import AutoTokenizer

    folder, trainer = runs("llama3/debug")
    tokenizer = AutoTokenizer.from_pretrained(_export(folder, tmp_path / "hf"))
    text = "def f(x):\n    return 'ü €'  # a comment\n"
    assert tokenizer(text).input_ids == trainer.tokenizer.encode(text, add_bos=True, add_eos=False)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (trainer.tokenizer.bos_id, trainer.tokenizer.eos_id)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_tokenizer_that_leaves_bos_to_its_user_is_noted(runs, tmp_path):
    folder, trainer = runs("llama3/debug")
    shutil.copytree(trainer.config.hf_assets_path, tmp_path / "tokenizer")
    assert Export(Checkpoint(folder), tokenizer=tmp_path / "tokenizer").notes() == []
    settings = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(settings | {"post_processor": None}))
    (note,) = Export(Checkpoint(folder), tokenizer=tmp_path / "tokenizer").notes()
    assert note.startswith("training put <|bos|> before every document, which this tokenizer does not do")


def test_shards_hold_the_tensors_of_one_file_bit_for_bit(runs, tmp_path):
    folder, _ = runs("moe/debug")
    whole = _export(folder, tmp_path / "whole")
    sharded = _export(folder, tmp_path / "sharded", max_shard_size="500KB")
    assert not (whole / "model.safetensors.index.json").exists()
    expected = load_file(whole / "model.safetensors")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(sharded.glob("*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values()) and len(files) > 5
    found = {}
    for path in files:
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        # Tensors larger than a shard, the embeddings, have one of their own.
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 500_000
        found |= tensors
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert _load(sharded).num_parameters() == sum(tensor.numel() for tensor in expected.values())


def test_bfloat16_keeps_router_and_expert_bias_in_float32(runs, tmp_path):
    folder, _ = runs("moe/debug")
    full = load_file(_export(folder, tmp_path / "full") / "model.safetensors")
    half = load_file(_export(folder, tmp_path / "half", dtype="bfloat16") / "model.safetensors")
    assert full.keys() == half.keys()
    kept = {name for name, tensor in half.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in full if name.endswith(("mlp.gate.weight", "e_score_correction_bias"))}
    assert len(kept) == 6
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor if name in kept else tensor.bfloat16()), name
    assert _load(tmp_path / "half").dtype == torch.bfloat16
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_nitp_costs_nothing_at_inference(assets, tmp_path):
    """Same tensors, sizes and FLOPs as the NTP baseline."""
    models = {}
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        saved_run(folder, nitp={"weight": weight}, training=TRAINING, generated_data=False)
        done = Export(Checkpoint(folder)).write(tmp_path / f"hf-{weight}")
        assert len(done.left_out) == (3 if weight else 0)
        models[weight] = _load(done.folder)
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


def test_the_card_names_run_step_metrics_and_paper(runs, tmp_path):
    folder, _ = runs("llama3/debug")
    card = (_export(folder / "checkpoint/step-2", tmp_path / "hf") / "README.md").read_text()
    records = read_records(folder / "metrics.jsonl")
    for words in (
        "library_name: transformers",
        "`LlamaForCausalLM` (llama3 debug), pre-trained with next implicit token prediction",
        "taken at step 2 of 3",
        f"| NTP loss, training batch | {records[1]['ntp_loss']:.4f} |",
        f"| NITP loss, training batch | {records[1]['nitp_loss']:.4f} |",
        "| nitp weight | 20.0 |",
        "arXiv:2605.24956",
    ):
        assert words in card, words
    assert f"{records[2]['ntp_loss']:.4f}" not in card


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
        Export(Checkpoint(tmp_path / "run"))
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
        (_cut_data, "step-3 cannot be read: "),
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
        Export(Checkpoint(run)).write(tmp_path / "hf")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".hf*"))


def test_an_interrupted_checkpoint_is_passed_over(runs, tmp_path):
    run = _copy(runs, tmp_path)
    (run / "checkpoint/step-3/.metadata").unlink()
    assert Checkpoint(run).step == 2
    with pytest.raises(UserError, match="step-3 has no .metadata: its writing was interrupted"):
        Checkpoint(run / "checkpoint/step-3")


def test_the_script_writes_all_or_nothing_and_ends_with_one_line(runs, tmp_path):
    folder, _ = runs("llama3/debug")
    command = [sys.executable, "scripts/export_hf.py", "--checkpoint", str(folder), "--out", str(tmp_path / "hf")]
    # What an export that was killed left behind.
    (tmp_path / ".hf.incomplete").mkdir()
    (tmp_path / ".hf.incomplete/model.safetensors").write_text("half")
    done = subprocess.run([*command, "--max-shard-size", "1MB"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "LlamaForCausalLM, float32" in done.stdout and "without 3 tensors of the projector" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    for option, message in {
        "": f"--out {tmp_path}/hf exists already",
        f"--out={tmp_path}/new --max-shard-size=many": "--max-shard-size = 'many'",
        f"--out={tmp_path}/new --checkpoint={tmp_path}/hf": "last_save_in_hf",
    }.items():
        refused = subprocess.run([*command, *option.split()], capture_output=True, text=True)
        assert refused.returncode != 0
        assert message in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


_MEASURED = """
import sys, threading
from pathlib import Path
from nitp_titan.checkpoint import Checkpoint
from nitp_titan.hf.export import Export

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())

run, out = map(Path, sys.argv[1:])
for size in ("10MB", "500MB"):
    export = Export(Checkpoint(run), max_shard_size=size)
    before, peak, done = resident(), 0, threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    written = export.write(out / size)
    done.set()
    watcher.join()
    print(peak - before, written.num_bytes)
"""


def test_the_memory_of_an_export_is_that_of_a_shard(runs, tmp_path):
    """A model of 190 MB in shards of 10 MB; in one shard the same measurement sees the whole model."""
    run = tmp_path / "run"
    run.mkdir()
    resolved = (runs("llama3/debug")[0] / "resolved.toml").read_text()
    resolved = resolved.replace('family = "llama3"', 'family = "odd_models"').replace('"debug"', '"llama_tall"')
    (run / "resolved.toml").write_text(resolved)
    model = build_model_spec(ModelConfig(family="odd_models", flavor="llama_tall")).model.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(model.state_dict(), checkpoint_id=run / "checkpoint/step-1", no_dist=True)
    command = [sys.executable, "-c", _MEASURED, str(run), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT}/tests"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    sharded, whole = (tuple(map(int, line.split())) for line in done.stdout.splitlines()[-2:])
    assert sharded[1] == whole[1] > 190e6
    assert sharded[0] < 50e6
    assert whole[0] > 180e6


def test_no_tensor_of_the_largest_model_is_larger_than_a_shard():
    """So the bound above, a shard and one tensor, holds for 45B: at most 8 GB for 180 GB of weights."""
    with torch.device("meta"):
        tensors = build_model_spec(ModelConfig(family="moe", flavor="45B-A5.5B")).model.build().state_dict()
    assert sum(tensor.nbytes for tensor in tensors.values()) > 175e9
    assert (
        max(tensor.nbytes for tensor in tensors.values()) < 3e9 < 5e9 == float(MAX_SHARD_SIZE.removesuffix("GB")) * 1e9
    )


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
    folder = _export(tmp_path / "run", tmp_path / "hf")
    scores = perplexity.measure(text, "text", 128, LoadedModel(str(folder), _load(folder), None, 2))
    assert scores["cross_entropy"].value == pytest.approx(logged["ntp_loss"], abs=2e-6)
    num_bytes, num_tokens = sum(len(part.encode()) for part in documents), 4 * 128
    bits = logged["ntp_loss"] * num_tokens / math.log(2) / num_bytes
    assert scores["bits_per_byte"].value == pytest.approx(bits, abs=2e-6)
