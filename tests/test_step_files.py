import json

import pytest

from nitp_titan.machine.failures import surroundings
from nitp_titan.step_files import read_records, StepFile


def _write(path, steps, *, resume=None):
    file = StepFile(path)
    if resume is not None:
        file.resume(resume)
    for step in steps:
        file.append({"step": step, "ntp_loss": 1.0 / step})
    file.close()


def test_a_resumed_file_holds_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2, 3, 4, 5])
    _write(path, [4, 5, 6], resume=3)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5, 6]
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2])
    with path.open("a") as stream:
        stream.write('{"step": 3, "ntp_')
    assert [record["step"] for record in read_records(path)] == [1, 2]
    _write(path, [3], resume=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_start_without_a_checkpoint_replaces_what_an_earlier_one_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for steps in ([1, 2], [1, 2, 3], [1]):
        _write(path, steps)
        assert [record["step"] for record in read_records(path)] == steps
    assert list(tmp_path.iterdir()) == [path]


def test_a_resume_without_a_file_starts_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, [8], resume=7)
    assert [record["step"] for record in read_records(path)] == [8]


def test_a_full_disk_is_said_with_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = StepFile(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError) as error:
        file.append({"step": 1})
    assert str(surroundings(error.value)) == f"{tmp_path}/metrics.jsonl cannot be used: the disk is full."
