"""Hugging Face models into sharded models and back: two ranks against one."""

import json
import shutil

import pytest
import torch
from from_hf import start, STARTS
from helpers import export_of, saved_run, with_expert_bias, without_expert_bias
from processes import free_port, warm_ranks
from safetensors.torch import load_file

from nitp_titan.models.settings import ModelConfig
from nitp_titan.step_files import read_records


@pytest.fixture(scope="module")
def started(assets, tmp_path_factory):
    """Folder with, for each of `STARTS`, a model ``hf`` and the runs ``1`` and ``2`` that start from it."""
    folder = tmp_path_factory.mktemp("from_hf")
    for model in STARTS:
        family, _, flavor = model.partition("/")
        change = with_expert_bias if family == "moe" else without_expert_bias
        settings = {"model": ModelConfig(family=family, flavor=flavor), "generated_data": False}
        saved_run(folder / model / "run", change=change, nitp={"weight": 20.0}, **settings)
        export_of(folder / model / "run", max_shard_size="1MB").write(folder / model / "hf")
        start(folder, model, 1)
    ports = folder / "ports.json"
    ports.write_text(json.dumps({model: free_port() for model in STARTS}))
    done = warm_ranks(2, "tests/distributed/from_hf.py", str(folder), str(ports))
    assert done.returncode == 0, done.stderr[-4000:]
    errors = [path.read_text()[-3000:] for path in folder.rglob("*.error")]
    assert not errors, errors[0]
    return folder


@pytest.mark.parametrize("model", STARTS)
def test_two_ranks_start_from_a_hugging_face_model_as_one_does(started, model):
    one, two = (read_records(started / model / ranks / "metrics.jsonl") for ranks in "12")
    assert len(one) == len(two) == 1
    assert two[0]["ntp_loss"] == pytest.approx(one[0]["ntp_loss"], abs=1e-5)


@pytest.mark.parametrize("model", ["llama3/debug", "moe/debug"])
def test_the_checkpoint_of_two_ranks_exports_as_that_of_one(started, tmp_path, model):
    exported = []
    for ranks in "12":
        run = started / model / ranks
        # The runs' own names a generated dataset, which only tests can load.
        shutil.copy(started / model / "run/resolved.toml", run)
        export_of(run).write(tmp_path / ranks)
        exported.append(load_file(tmp_path / ranks / "model.safetensors"))
    before = {}
    for file in (started / model / "hf").glob("*.safetensors"):
        before |= load_file(file)
    one, two = exported
    assert one.keys() == two.keys() == before.keys()
    for name in one:
        moved, apart = (one[name] - before[name]).abs(), (one[name] - two[name]).abs()
        assert apart.max() <= 1e-3 * moved.max(), name
    assert any(not torch.equal(one[name], before[name]) for name in one)
