"""Running and keeping results; names and identities of models."""

import os
import shutil

import pytest
import torch

from nitp_titan.errors import UserError
from nitp_titan.evaluation.models import fingerprint
from nitp_titan.evaluation.plan import Plan, Task
from nitp_titan.evaluation.pretrained import (
    load_pretrained,
    Model,
    read_models,
    SPREAD,
)
from nitp_titan.evaluation.run import evaluate, EvaluationSettings
from nitp_titan.evaluation.scores import ratio, Score
from nitp_titan.evaluation.store import ResultStore


def _score(values) -> Score:
    return ratio(values, [1.0] * len(values))


def test_results_are_valid_for_one_setting(tmp_path):
    store = ResultStore(tmp_path)
    made = {"acc": _score([1.0, 0.0, 1.0])}
    store.save("owner/name", "mmlu", {"limit": None, "metrics": ("acc",)}, made)
    assert store.load("owner/name", "mmlu", {"limit": None, "metrics": ("acc",)}) == made
    assert store.load("owner/name", "mmlu", {"limit": 5, "metrics": ("acc",)}) is None
    assert store.load("owner/name", "bbh", {"limit": None, "metrics": ("acc",)}) is None
    assert store.path("owner/name", "mmlu") == tmp_path / "results/owner-name/mmlu.json"
    store.path("owner/name", "mmlu").write_text("[]")
    assert store.load("owner/name", "mmlu", {"limit": None, "metrics": ("acc",)}) is None


def test_a_task_that_fails_leaves_the_others(workplace, tmp_path, capsys):
    def fail(loaded):
        raise UserError("its data are not there")

    tasks = [Task("bad", {}, fail), Task("good", {}, lambda loaded: {"acc": _score([1.0, 0.0])})]
    models = read_models([f"NTP={workplace}/ntp"])
    found = evaluate(models, Plan(tasks=tasks), EvaluationSettings(tmp_path, "float32", "cpu", 1))
    assert found.failures == {("NTP", "bad"): "its data are not there"} and list(found.scores["NTP"]) == ["good"]
    assert "NTP: bad was not run: its data are not there (1 of 2" in capsys.readouterr().out


def test_what_was_finished_is_kept_when_a_run_is_stopped(workplace, tmp_path):
    def stop(loaded):
        raise KeyboardInterrupt

    tasks = [Task("first", {}, lambda loaded: {"acc": _score([1.0])}), Task("second", {}, stop)]
    models, settings = read_models([f"NTP={workplace}/ntp"]), EvaluationSettings(tmp_path, "float32", "cpu", 1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(models, Plan(tasks=tasks), settings)
    ran = []
    tasks = [Task(name, {}, lambda loaded, name=name: ran.append(name) or {}) for name in ("first", "second")]
    evaluate(models, Plan(tasks=tasks), settings)
    assert ran == ["second"]


def test_a_fingerprint_is_of_weights_configuration_and_tokenizer(workplace, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(workplace / "ntp", folder)
    prints = [fingerprint(str(folder))]
    assert fingerprint(str(folder)) == prints[0]
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text((folder / name).read_text() + " ")
        prints.append(fingerprint(str(folder)))
    os.utime(folder / "model.safetensors", (1, 1))
    prints.append(fingerprint(str(folder)))
    assert len(set(prints)) == 4


def test_models_are_called_by_their_folder_or_name(workplace, tmp_path):
    ntp = f"{workplace}/ntp"
    assert read_models([ntp, f"x={workplace}/nitp"]) == [Model("ntp", ntp), Model("x", f"{workplace}/nitp")]
    twin = tmp_path / "lr=3" / "ntp"
    shutil.copytree(ntp, twin)
    assert [model.name for model in read_models([ntp, str(twin)])] == [ntp, str(twin)]
    assert read_models([str(twin)]) == [Model("ntp", str(twin))]


def test_a_spread_model_is_the_same_model(workplace):
    """Here over the only device; the placement is accelerate's."""
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        (one, _), (spread, _) = (load_pretrained(f"{workplace}/ntp", device=device) for device in ("cpu", SPREAD))
        assert spread.device.type == "cpu"
        assert torch.equal(spread(tokens).logits, one(tokens).logits)
