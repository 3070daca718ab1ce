"""What is checked before anything is built, and what is no mistake."""

import json
import logging
from pathlib import Path

import pytest
from helpers import make_config, train
from torchtitan.config import OverrideConfig
from torchtitan.observability.structured_logger import structured_logging

from nitp_titan.data.loader import TextDataLoader
from nitp_titan.errors import UserError
from nitp_titan.models import meta_tensors
from nitp_titan.runs.preflight import checkpoint_bytes
from nitp_titan.runs.structured_log import begin_log, open_log


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nitp_titan.machine.cpu.dense_flex_attn",
            "names no registered @override. Did you mean 'nitp_titan.machine.cpu",
        ),
        ("no_such_module.function", "module 'no_such_module' could not be imported"),
        ("function", "must be a 'module.function' path"),
    ],
)
def test_an_override_that_does_not_exist_is_refused(assets, tmp_path, name, message):
    config = make_config(
        tmp_path, override=OverrideConfig(imports=["nitp_titan.machine.cpu.dense_flex_attention", name])
    )
    with pytest.raises(UserError) as refused:
        config.build()
    assert str(refused.value).startswith("[override] imports: ") and message in str(refused.value)
    assert not (tmp_path / "resolved.toml").exists()


def test_the_room_for_a_checkpoint_is_what_the_run_saves(assets, tmp_path):
    config = make_config(tmp_path, training={"steps": 3}, checkpoint={"interval": 2, "last_save_model_only": True})
    tensors = meta_tensors(config.model_spec)
    parameters = 1_192_800
    # A number and Adam's two moments.
    assert checkpoint_bytes(config, tensors) == 12 * parameters
    config.training.dtype = "bfloat16"
    assert checkpoint_bytes(config, tensors) == 6 * parameters
    config.training.dtype = "float32"
    config.optimizer.implementation = "fused_opt_states_bf16"
    assert checkpoint_bytes(config, tensors) == 8 * parameters
    # Only the last step is saved, and of it the model.
    config.checkpoint.interval, config.checkpoint.export_dtype = 4, "bfloat16"
    assert checkpoint_bytes(config, tensors) == 2 * parameters


def test_a_document_longer_than_the_sequence_is_no_mistake(assets, tmp_path):
    text = "A sentence that goes on, and on, and on. " * 400
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    data = TextDataLoader.Config(dataset_path=str(tmp_path / "long.jsonl"))
    config = make_config(tmp_path / "run", generated_data=False, dataloader=data, training={"steps": 2})
    trainer = train(config)
    assert len(trainer.tokenizer.encode(text)) > 2 * config.training.seq_len
    assert trainer.step == 2 and trainer.ntokens_seen == 2 * 4 * 128


@pytest.fixture
def log(monkeypatch):
    """TorchTitan's structured logger, for this test alone."""
    log = logging.Logger("structured", logging.INFO)
    monkeypatch.setattr(structured_logging, "_structured_logger", log)
    yield log
    for handler in log.handlers:
        handler.close()


def test_the_structured_log_is_written_once_the_run_folder_is_this_runs(log, tmp_path):
    begin_log(structured_logger=log, rank=0, source="training", output_dir=str(tmp_path / "run"))
    log.info("started", extra=structured_logging.event_extra("started"))
    assert list(tmp_path.iterdir()) == []
    open_log(str(tmp_path / "other"))
    assert list(tmp_path.iterdir()) == []
    begin_log(structured_logger=log, rank=0, source="training", output_dir=str(tmp_path / "run"))
    log.info("started", extra=structured_logging.event_extra("started"))
    open_log(str(tmp_path / "run"))
    log.info("trains", extra=structured_logging.event_extra("trains"))
    open_log(str(tmp_path / "run"))
    (file,) = (tmp_path / "run/structured_logs").iterdir()
    assert [("started" in line, "trains" in line) for line in file.read_text().splitlines()] == [(1, 0), (0, 1)]


def test_a_full_disk_ends_the_structured_log_in_one_line_and_not_in_a_traceback_per_record(log, tmp_path, capsys):
    begin_log(structured_logger=log, rank=0, source="training", output_dir=str(tmp_path))
    open_log(str(tmp_path))
    (handler,) = log.handlers
    # The full file stays open: closing it would write once more.
    handler.setStream(Path("/dev/full").open("w")).close()  # noqa: SIM115
    with pytest.raises(UserError, match=r"structured_logs/training.*\.jsonl cannot be used: the disk is full\.$"):
        log.info("step", extra=structured_logging.event_extra("step"))
    log.info("closing", extra=structured_logging.event_extra("closing"))
    assert capsys.readouterr().err == ""
    handler.stream = None
