"""Checkpoints and Hugging Face models that a run cannot start from: one line, on one rank and on two."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import tomli_w
from helpers import export_of
from outcome import is_one_line, tree
from processes import warm_ranks

from nitp_titan.config import recipe

PROJECT = recipe.PROJECT


@pytest.fixture(scope="module")
def saved(assets, tmp_path_factory):
    """A run of three steps with its checkpoints, and its Hugging Face model."""
    from helpers import saved_run

    folder = tmp_path_factory.mktemp("saved")
    saved_run(folder / "run", generated_data=False)
    export_of(folder / "run").write(folder / "hf")
    return folder


def _cut(name: str):
    def cut(folder: Path) -> None:
        (path,) = folder.glob(name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def _scribble(name: str):
    def scribble(folder: Path) -> None:
        (path,) = folder.glob(name)
        content = bytearray(path.read_bytes())
        content[8:200] = random.Random(0).randbytes(192)
        path.write_bytes(content)

    return scribble


def _edit_config(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "qwen2"}))


STEP = "checkpoint/step-3"
# Name: what is started from, the recipe, what is done to it before, and what the error says.
CHECKPOINTS = {
    "missing": ("rnu", "debug/nitp_debug", None, "is not a folder. Did you mean"),
    "half-written": ("run/" + STEP, "debug/nitp_debug", lambda f: (f / ".metadata").unlink(), "was interrupted"),
    "empty": ("run/" + STEP, "debug/nitp_debug", lambda f: shutil.rmtree(f) or f.mkdir(), "no complete checkpoint"),
    "of another model": ("run/" + STEP, "debug/nitp_qwen3_debug", None, "q_norm.weight', which the model needs"),
    "with experts": ("run/" + STEP, "debug/nitp_moe_debug", None, "for which the model has no place"),
    "metadata cut": ("run/" + STEP, "debug/nitp_debug", _cut(".metadata"), ".metadata"),
    "metadata overwritten": ("run/" + STEP, "debug/nitp_debug", _scribble(".metadata"), ".metadata"),
    "data cut": ("run/" + STEP, "debug/nitp_debug", _cut("__0_0.distcp"), "__0_0.distcp"),
    "data missing": ("run/" + STEP, "debug/nitp_debug", lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp"),
    "safetensors cut": ("hf", "debug/nitp_debug", _cut("*.safetensors"), "model.safetensors cannot be read"),
    "safetensors overwritten": (
        "hf",
        "debug/nitp_debug",
        _scribble("*.safetensors"),
        "model.safetensors cannot be read",
    ),
    "no safetensors": ("hf", "debug/nitp_debug", lambda f: (f / "model.safetensors").unlink(), "holds no safetensors"),
    "config of another model": (
        "hf",
        "debug/nitp_debug",
        _edit_config,
        "model_type = 'qwen2', but the recipe's model has",
    ),
    "config cut": ("hf", "debug/nitp_debug", _cut("config.json"), "config.json"),
    "safetensors of another model": ("hf", "debug/nitp_qwen3_debug", None, "config.json: model_type = 'llama', but"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_one_line_and_nothing_is_written(
    saved, project, entry, machine, tmp_path, name
):
    place, recipe_name, change, message = CHECKPOINTS[name]
    shutil.copytree(saved, tmp_path / "start")
    path = tmp_path / "start" / place
    if change is not None:
        change(path)
    in_hf = place == "hf"
    train_config = machine(checkpoint={"initial_load_path": str(path), "initial_load_in_hf": in_hf})
    before = tree(project)
    end, _ = entry("--recipe", recipe_name, "--train-config", train_config)
    assert is_one_line(end) and message in end, end
    assert end.startswith("error: machine.toml: [checkpoint] initial_load_path: "), end
    assert tree(project) == before


def test_all_ranks_end_with_one_line_for_a_checkpoint_of_another_model(saved, tmp_path):
    start = time.monotonic()
    flags = ["--checkpoint.initial_load_path", str(saved / "run"), "--dump_folder", str(tmp_path / "run")]
    flags += ["--training.local_batch_size", "8"]
    recipe_flags = ["--recipe", "debug/nitp_qwen3_debug", "--train-config", "cpu"]
    done = warm_ranks(2, "-m", "nitp_titan.train", *recipe_flags, *flags)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "which the model needs" in line
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 90 and not (tmp_path / "run/resolved.toml").exists()


def test_what_one_rank_alone_misses_ends_all_with_its_line(assets, tmp_path):
    """Rank 1 looks from a folder without data."""
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    text = recipe.read_toml(PROJECT / "train_configs/cpu.toml")
    text["dataloader"]["dataset_path"] = "mine.jsonl"
    text["training"]["local_batch_size"] = 8
    (tmp_path / "machine.toml").write_text(tomli_w.dumps(text | {"dump_folder": str(tmp_path / "run")}))
    (tmp_path / "0/mine.jsonl").write_text('{"text": "some text"}\n')
    for rank in ("0", "1"):
        (tmp_path / rank / "assets").symlink_to(PROJECT / "assets")
    start = time.monotonic()
    script = str(PROJECT / "tests/bad_input/from_own_folder.py")
    done = warm_ranks(2, script, str(tmp_path), "--recipe", "debug/nitp_debug", "--train-config", "../machine.toml")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "dataset_path = 'mine.jsonl' names no file" in line
    assert "Traceback" not in done.stderr and time.monotonic() - start < 120
