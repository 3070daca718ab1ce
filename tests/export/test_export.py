"""What an export writes, and what memory it takes."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from exported import export, load
from helpers import export_of
from processes import PROJECT, warm_python
from safetensors.torch import load_file

from nitp_titan.export.export import MAX_SHARD_SIZE
from nitp_titan.models import build_model_spec
from nitp_titan.models.settings import ModelConfig
from nitp_titan.step_files import read_records


def test_the_tokenizer_is_that_of_training(runs, tmp_path):
    from transformers import AutoTokenizer

    folder, trainer = runs("llama3/debug")
    tokenizer = AutoTokenizer.from_pretrained(export(folder, tmp_path / "hf"))
    text = "def f(x):\n    return 'ü €'  # a comment\n"
    assert tokenizer(text).input_ids == trainer.tokenizer.encode(text, add_bos=True, add_eos=False)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (trainer.tokenizer.bos_id, trainer.tokenizer.eos_id)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_tokenizer_that_leaves_bos_to_its_user_is_noted(runs, tmp_path):
    folder, trainer = runs("llama3/debug")
    shutil.copytree(trainer.config.hf_assets_path, tmp_path / "tokenizer")
    assert export_of(folder, tokenizer=tmp_path / "tokenizer").notes() == []
    settings = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(settings | {"post_processor": None}))
    (note,) = export_of(folder, tokenizer=tmp_path / "tokenizer").notes()
    assert note.startswith("training put <|bos|> before every document, which this tokenizer does not do")


def test_shards_hold_the_tensors_of_one_file_bit_for_bit(runs, tmp_path):
    folder, _ = runs("moe/debug")
    whole = export(folder, tmp_path / "whole")
    sharded = export(folder, tmp_path / "sharded", max_shard_size="500KB")
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
    assert load(sharded).num_parameters() == sum(tensor.numel() for tensor in expected.values())


def test_bfloat16_keeps_router_and_expert_bias_in_float32(runs, tmp_path):
    folder, _ = runs("moe/debug")
    full = load_file(export(folder, tmp_path / "full") / "model.safetensors")
    half = load_file(export(folder, tmp_path / "half", dtype="bfloat16") / "model.safetensors")
    assert full.keys() == half.keys()
    kept = {name for name, tensor in half.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in full if name.endswith(("mlp.gate.weight", "e_score_correction_bias"))}
    assert len(kept) == 6
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor if name in kept else tensor.bfloat16()), name
    assert load(tmp_path / "half").dtype == torch.bfloat16
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_card_names_run_step_metrics_and_paper(runs, tmp_path):
    folder, _ = runs("llama3/debug")
    card = (export(folder / "checkpoint/step-2", tmp_path / "hf") / "README.md").read_text()
    records = read_records(folder / "metrics.jsonl")
    for words in (
        "library_name: transformers",
        "`LlamaForCausalLM` (llama3 debug), pre-trained with next implicit token prediction",
        "taken at step 2 of 3",
        f"| NTP loss, training batch, step 2 | {records[1]['ntp_loss']:.4f} |",
        f"| NITP loss, training batch, step 2 | {records[1]['nitp_loss']:.4f} |",
        "| nitp weight | 20.0 |",
        "arXiv:2605.24956",
    ):
        assert words in card, words
    assert f"{records[2]['ntp_loss']:.4f}" not in card


def test_the_snippet_of_the_card_runs_in_the_folder_of_the_model(runs, tmp_path, monkeypatch, capsys):
    out = export(runs("llama3/debug")[0], tmp_path / "hf")
    (snippet,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(out)
    exec(snippet, {})
    assert "The" in capsys.readouterr().out


def test_the_script_writes_all_or_nothing_and_ends_with_one_line(runs, tmp_path):
    folder, _ = runs("llama3/debug")
    command = ["scripts/export_hf.py", "--checkpoint", str(folder), "--out", str(tmp_path / "hf")]
    # An empty folder is no other model.
    (tmp_path / "hf").mkdir()
    # What an export that was killed left behind.
    (tmp_path / ".hf.incomplete").mkdir()
    (tmp_path / ".hf.incomplete/model.safetensors").write_text("half")
    done = warm_python(*command, "--max-shard-size", "1MB")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "LlamaForCausalLM, float32" in done.stdout and "without 3 tensors of the projector" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()}
    again = warm_python(*command, "--max-shard-size", "1MB")
    assert again.returncode == 0 and "this export is there already" in again.stdout, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()} == written
    for option, message in {
        "": f"--out {tmp_path}/hf exists already",
        f"--out={tmp_path}/new --max-shard-size=many": "--max-shard-size = 'many'",
        f"--out={tmp_path}/new --max-shard-size=1e400GB": "--max-shard-size = '1e400GB'",
        f"--out={tmp_path}/new --checkpoint={tmp_path}/hf": "last_save_in_hf",
    }.items():
        refused = warm_python(*command, *option.split())
        assert refused.returncode != 0
        assert message in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


_MEASURED = """
import sys, threading
from pathlib import Path
from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.export.export import Export
from nitp_titan.training.trainer import load_config

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())

run, out = map(Path, sys.argv[1:])
for size in ("10MB", "500MB"):
    export = Export(Checkpoint(run), load_config(run / "resolved.toml", None), max_shard_size=size)
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
