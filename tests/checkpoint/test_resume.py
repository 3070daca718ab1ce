"""Checkpoints of a run: whole or none, and checked before a run resumes from them."""

import dataclasses
import json
import logging
import os
import resource
import shutil
import signal
import warnings
from contextlib import contextmanager

import pytest
import torch
from helpers import make_config, parameters, saved_run

from nitp_titan.checkpoint.resume import check_data
from nitp_titan.checkpoint.steps import complete_steps
from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.errors import UserError
from nitp_titan.machine import quiet
from nitp_titan.step_files import read_records


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory):
    """A run of three steps on real text, with checkpoints after the second and the third."""
    folder = tmp_path_factory.mktemp("resume") / "run"
    saved_run(folder, generated_data=False, validator={"enable": False})
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def _config(folder, **sections):
    checkpoint = {"enable": True, "interval": 2, "last_save_model_only": False, **sections.pop("checkpoint", {})}
    sections = {"validator": {"enable": False}, "resume": True, **sections}
    return make_config(folder, generated_data=False, checkpoint=checkpoint, **sections)


def _resumed(folder, **sections):
    trainer = _config(folder, **sections).build()
    trainer.checkpointer.load(step=-1)
    return trainer


@contextmanager
def _full_disk():
    """Files of this process end at 100 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_half_written_checkpoint_is_removed_and_neither_loaded_nor_counted(copy):
    for step in (4, 5):
        shutil.copytree(copy / "checkpoint/step-3", copy / f"checkpoint/step-{step}")
        (copy / f"checkpoint/step-{step}/.metadata").unlink()
    trainer = _resumed(copy, checkpoint={"keep_latest_k": 2})
    assert trainer.step == 3
    assert sorted(path.name for path in (copy / "checkpoint").iterdir()) == ["step-2", "step-3"]
    trainer.checkpointer.save(4)
    trainer.close()
    assert sorted(path.name for path in (copy / "checkpoint").iterdir()) == ["step-3", "step-4"]


def test_a_run_that_only_loads_removes_nothing(copy):
    (copy / "checkpoint/step-3/.metadata").unlink()
    trainer = _resumed(copy, checkpoint={"load_only": True})
    trainer.close()
    assert trainer.step == 2 and (copy / "checkpoint/step-3").is_dir()


def test_what_is_deleted_stops_being_a_checkpoint_first(copy, monkeypatch):
    trainer = _resumed(copy, checkpoint={"keep_latest_k": 2})

    def interrupted(folder, *args, **kwargs):
        raise OSError("killed")

    monkeypatch.setattr("shutil.rmtree", interrupted)
    trainer.checkpointer.save(4)
    trainer.close()
    assert any((copy / "checkpoint/step-2").glob("*.distcp"))
    assert not (copy / "checkpoint/step-2/.metadata").exists()
    assert Checkpoint(copy).step == 4


def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints_whole(copy):
    trainer = _resumed(copy)
    with _full_disk(), pytest.raises(UserError, match=r"step-4 could not be written by rank 0: .*File too large"):
        trainer.checkpointer.save(4)
    trainer.close()
    assert not (copy / "checkpoint/step-4/.metadata").exists()
    assert Checkpoint(copy).step == 3


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_step_that_is_written_again_is_no_checkpoint_meanwhile(copy, mode):
    trainer = _resumed(copy, checkpoint={"load_step": 2, "async_mode": mode})
    with _full_disk(), pytest.raises(UserError, match="could not be written by rank 0: .*File too large"):
        trainer.checkpointer.save_now(3)
        trainer.checkpointer.maybe_wait_for_saving()
    trainer.close()
    assert Checkpoint(copy).step == 2


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_step_between_two_intervals_is_saved_on_demand_once(copy, mode):
    trainer = _resumed(copy, checkpoint={"interval": 100, "async_mode": mode})
    trainer.checkpointer.save_now(7)
    written = (copy / "checkpoint/step-7/.metadata").stat().st_mtime_ns
    trainer.checkpointer.save_now(7)
    trainer.close()
    assert (copy / "checkpoint/step-7/.metadata").stat().st_mtime_ns == written
    state = Checkpoint(copy).load(["norm.weight"])
    assert torch.equal(state["norm.weight"], parameters(trainer)["norm.weight"])


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_as_many_checkpoints_are_kept_however_they_are_written(copy, mode):
    trainer = _resumed(copy, checkpoint={"interval": 1, "keep_latest_k": 2, "async_mode": mode})
    for step in (4, 5, 6):
        trainer.checkpointer.save(step)
    trainer.checkpointer.maybe_wait_for_saving()
    trainer.close()
    assert list(complete_steps(copy / "checkpoint")) == [5, 6]


def _truncate(folder):
    (file,) = (folder / "checkpoint/step-3").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1000])


def _garbage(folder):
    (folder / "checkpoint/step-3/.metadata").write_bytes(b"no metadata")


@pytest.mark.parametrize(
    ("sections", "damage", "message"),
    [
        (
            {"model": {"family": "qwen3", "flavor": "debug"}},
            None,
            "step-3 has no tensor 'layers.0.attention.q_norm.weight'",
        ),
        ({"nitp": {"weight": 0.0}}, None, None),
        (
            {"nitp": {"projector_width": 2.0}},
            None,
            r"step-3: 'nitp.projector.w1.weight' is \[\d+, \d+\], but the model",
        ),
        (
            {"checkpoint": {"load_step": 9}},
            None,
            r"load_step = 9: .* has no such complete checkpoint; there are: 2, 3\.",
        ),
        (
            {"dataloader": {"num_streams": 4}},
            None,
            r"step-3 is of data in 1 streams, but \[dataloader\] num_streams = 4",
        ),
        ({}, _truncate, r"__0_0.distcp has [\d,]+ bytes instead of [\d,]+: the checkpoint is incomplete"),
        ({}, _garbage, r"step-3/.metadata is damaged"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_built(copy, sections, damage, message):
    if damage:
        damage(copy)
    if message is None:
        trainer = _resumed(copy, **sections)
        trainer.close()
        assert trainer.step == 3
        return
    with pytest.raises(UserError, match=message):
        _config(copy, **sections).build()


def test_a_step_to_load_is_neither_ignored_in_a_new_folder_nor_in_a_remote_one(assets, tmp_path):
    with pytest.raises(UserError, match=r"load_step = 9: .* has no such complete checkpoint; there are: none\."):
        _config(tmp_path / "new", checkpoint={"load_step": 9}).build()
    assert not (tmp_path / "new/resolved.toml").exists()
    remote = {"load_step": 9, "folder": f"file://{tmp_path}/remote"}
    trainer = _config(tmp_path / "run", checkpoint=remote).build()
    trainer.close()
    assert trainer.config.checkpoint.load_step == 9


def test_a_resume_warns_of_nothing(copy):
    trainer = _config(copy).build()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        quiet.install.__wrapped__()
        trainer.checkpointer.load(step=-1)
    trainer.close()
    assert trainer.step == 3 and [str(each.message) for each in warned] == []


def test_a_run_that_ended_with_its_model_only_says_so(assets, tmp_path):
    trainer = _config(tmp_path, checkpoint={"last_save_model_only": True}, training={"steps": 2}, resume=False).build()
    trainer.checkpointer.save(2, last_step=True)
    trainer.close()
    with pytest.raises(
        UserError, match=r"step-2 holds the model only, .*last_save_model_only = true: the run has ended"
    ):
        _config(tmp_path).build()


def test_a_run_that_ended_with_safetensors_says_so(copy):
    last = copy / "checkpoint/step-5"
    last.mkdir()
    (last / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="step-5 is a Hugging Face model, .*last_save_in_hf = true: the run has ended"):
        _config(copy, training={"steps": 9}).build()


def test_a_finished_run_that_is_started_again_says_that_nothing_is_left(copy, assets, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("torchtitan.trainer.time.sleep", lambda seconds: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    caplog.set_level(logging.INFO)
    trainer = _config(copy, resume=False).build()
    trainer.train()
    trainer.close()
    assert f"{copy}: the run has done its 3 steps, nothing is left to train" in caplog.text
    assert "All 3 steps were done before: nothing was left to train." in caplog.messages
    config = _config(tmp_path / "ended", checkpoint={"last_save_model_only": True}, resume=False)
    trainer = config.build()
    trainer.checkpointer.save(3, last_step=True)
    trainer.close()
    caplog.clear()
    before = (tmp_path / "ended/starts.jsonl").read_text()
    with pytest.raises(SystemExit) as ended:
        config.build()
    assert not ended.value.code and "the run has done its 3 steps, nothing is left to train" in caplog.text
    assert (tmp_path / "ended/starts.jsonl").read_text() == before


def test_another_way_from_an_earlier_step_keeps_its_own_checkpoints(copy):
    trainer = _resumed(copy, checkpoint={"load_step": 2, "keep_latest_k": 2}, resume=False, training={"steps": 3})
    assert trainer.step == 2
    trainer.checkpointer.save_now(3)
    trainer.close()
    aside = copy / "checkpoint/set_aside/after_step_2"
    assert list(complete_steps(copy / "checkpoint")) == [2, 3] and list(complete_steps(aside)) == [3]
    assert [record["step"] for record in read_records(copy / "metrics.jsonl")] == [1, 2]
    assert [record["step"] for record in read_records(aside / "metrics.jsonl")] == [3]
    assert Checkpoint(copy).folder == copy / "checkpoint/step-3"
    trainer = _resumed(copy, resume=False)
    trainer.close()
    assert trainer.plan.resume.from_step == 3


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_step_that_was_loaded_or_saved_is_not_written_again(copy, mode):
    def written(step):
        return (copy / f"checkpoint/step-{step}/.metadata").stat().st_mtime_ns

    loaded = written(3)
    trainer = _resumed(copy, checkpoint={"async_mode": mode}, training={"steps": 9})
    # As after SIGTERM during the load.
    trainer.checkpointer.save_now(3)
    trainer.checkpointer.save(4)
    saved = written(4) if mode == "disabled" else None
    trainer.checkpointer.save_now(4)
    saved = saved or written(4)
    assert not trainer.checkpointer.save(4, last_step=True)
    trainer.close()
    assert (written(3), written(4)) == (loaded, saved)
    assert json.loads((copy / "last_checkpoint.json").read_text()) == {"step": 4}


def test_a_renamed_copy_of_a_checkpoint_is_neither_loaded_nor_deleted(copy):
    for name in ("step-2-best", "step-9.old"):
        shutil.copytree(copy / "checkpoint/step-2", copy / "checkpoint" / name)
    trainer = _resumed(copy, checkpoint={"interval": 1, "keep_latest_k": 2}, training={"steps": 9})
    assert trainer.step == 3
    for step in (4, 5):
        trainer.checkpointer.save(step)
    trainer.close()
    names = sorted(path.name for path in (copy / "checkpoint").iterdir())
    assert names == ["step-2-best", "step-4", "step-5", "step-9.old"]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_stop_without_checkpoints_says_that_nothing_is_saved(assets, tmp_path, monkeypatch, caplog, number, name):
    monkeypatch.setattr("torchtitan.trainer.time.sleep", lambda seconds: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    trainer = _config(tmp_path, checkpoint={"enable": False}, resume=False).build()
    train_step = trainer.train_step

    def stopped(batches):
        train_step(batches)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer, "train_step", stopped)
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + number
    assert caplog.messages[-1] == (
        f"Stopped by {name} after step 1. Nothing was saved ([checkpoint] enable = false): the same command starts "
        "again with step 1."
    )


def test_a_run_killed_between_a_checkpoint_and_its_validation_validates_again(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("torchtitan.trainer.time.sleep", lambda seconds: None)
    validator = {"enable": True, "freq": 2, "steps": 2}
    config = _config(tmp_path, validator=validator, training={"steps": 4}, resume=False)
    trainer = config.build()
    trainer.train()
    trainer.close()
    path = tmp_path / "validation.jsonl"
    whole = read_records(path)
    assert [record["step"] for record in whole] == [1, 2, 4]
    for kept in (whole[:2], whole):
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        trainer = config.build()
        trainer.train()
        trainer.close()
        assert read_records(path) == whole


def test_a_state_of_data_in_parts_is_refused_in_a_line(copy):
    """As checkpoints of before num_streams have it; their parts held other documents than the streams do."""
    checkpoint = Checkpoint(copy / "checkpoint/step-3")
    assert checkpoint.data_state == {"num_streams", "sequence", "stream_0"}
    checkpoint.data_state = {"num_shards", "sequence", "shard_0"}
    with pytest.raises(UserError, match=r"step-3 has no state of the data that this version can resume\. With"):
        check_data(checkpoint, 1)


def test_data_can_begin_again_in_other_streams(copy):
    config = _config(copy, dataloader={"num_streams": 4}, checkpoint={"exclude_from_loading": ["dataloader"]})
    trainer = config.build()
    trainer.checkpointer.load(step=-1)
    trainer.close()
    assert trainer.step == 3 and trainer.dataloader.state_dict()["sequence"] == 0


def test_the_tokens_of_all_ranks_are_in_the_state(run, monkeypatch):
    trainer = dataclasses.replace(_config(run), dump_folder=str(run.parent / "other")).build()
    monkeypatch.setattr(type(trainer), "_num_token_ranks", 4)
    trainer.ntokens_seen = 100
    state = trainer.state_dict()
    assert state["ntokens_seen"] == 400
    monkeypatch.setattr(type(trainer), "_num_token_ranks", 2)
    trainer.load_state_dict(state)
    trainer.close()
    assert trainer.ntokens_seen == 200
