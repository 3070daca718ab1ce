"""The comparison of a killed run with its reference, on made-up run folders: it notices whatever is lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from chaos.same_run import compare, complete_checkpoints


def _states(step: int) -> dict:
    weights = torch.arange(6.0).reshape(2, 3) + step
    return {"w": weights, "optimizer.state.w.exp_avg": weights / 7, "train_state.step": step, "sampler": {"read": [1]}}


def _write_checkpoint(run: Path, step: int, **changes) -> None:
    folder = run / f"checkpoint/step-{step}"
    shutil.rmtree(folder, ignore_errors=True)
    dcp.save(_states(step) | changes, checkpoint_id=folder, no_dist=True)


def _write_records(run: Path, *records: dict, name: str = "metrics.jsonl") -> None:
    (run / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def _record(step: int, **changes) -> dict:
    record = {"step": step, "loss": 10.0 - step, "spectrum": {"share": [0.5, float("nan")]}, "tokens_per_second": 100.0}
    return record | changes


def _write_run(run: Path) -> None:
    run.mkdir()
    _write_records(run, *map(_record, (1, 2, 3, 4)))
    _write_records(run, {"from_step": None}, name="starts.jsonl")
    for step in (2, 4):
        _write_checkpoint(run, step)


@pytest.fixture
def runs(tmp_path):
    for name in ("reference", "run"):
        _write_run(tmp_path / name)
    return tmp_path / "reference", tmp_path / "run"


def test_equal_runs_have_no_problem_whatever_their_speed_and_number_of_starts(runs):
    _write_records(runs[1], *(_record(step, tokens_per_second=7.0 * step) for step in (1, 2, 3, 4)))
    _write_records(runs[1], {"from_step": None}, {"from_step": 2}, name="starts.jsonl")
    comparison = compare(*runs)
    assert comparison.problems == [] and comparison.deviation == 0


def _half_write(run: Path) -> None:
    (run / "checkpoint/step-2/.metadata").unlink()


def _lose_a_rank(run: Path) -> None:
    (run / "checkpoint/step-4/__0_0.distcp").unlink()


def _nudge_a_weight(run: Path) -> None:
    weights = _states(4)["w"]
    weights[1, 2] = torch.nextafter(weights[1, 2], torch.tensor(torch.inf))
    _write_checkpoint(run, 4, w=weights)


def _cut_the_last_line(run: Path) -> None:
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-9])


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda run: _write_records(run, *map(_record, (1, 2, 4))), "metrics.jsonl: step 3 is missing"),
        (lambda run: _write_records(run, *map(_record, (1, 2, 3, 3, 4))), "metrics.jsonl: step 3 appears 2 times"),
        (lambda run: _write_records(run, *map(_record, (1, 2, 3, 4, 5))), "there is no step 5 in the reference"),
        (lambda run: _write_records(run, *map(_record, (1, 3, 2, 4))), "metrics.jsonl: its steps are out of order"),
        (
            lambda run: _write_records(run, *map(_record, (1, 2, 3)), _record(4, loss=6.5)),
            "metrics.jsonl: step 4 has loss = 6.5 instead of 6.0",
        ),
        (
            lambda run: _write_records(run, *map(_record, (1, 2, 3)), _record(4, spectrum={"share": [0.5, 0.5]})),
            "metrics.jsonl: step 4 has spectrum",
        ),
        (_cut_the_last_line, "metrics.jsonl has a line that is no JSON"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (_nudge_a_weight, "checkpoint/step-4: 'w' differs by"),
        (lambda run: _write_checkpoint(run, 4, w=-_states(4)["w"]), "checkpoint/step-4: 'w' differs by 2.0e+00"),
        (lambda run: _write_checkpoint(run, 2, **{"optimizer.state.w.exp_avg": torch.zeros(2, 3)}), "exp_avg' differs"),
        (lambda run: _write_checkpoint(run, 4, w=torch.zeros(3)), "'w' is of another shape or type"),
        (lambda run: _write_checkpoint(run, 4, **{"train_state.step": 3}), "'train_state.step' is 3 instead of 4"),
        (lambda run: _write_checkpoint(run, 4, sampler={"read": [2]}), "'sampler.read' is [2] instead of [1]"),
        (lambda run: _write_checkpoint(run, 4, more=torch.zeros(1)), "'more' is in one of the two only"),
        (_half_write, "checkpoint/step-2 is half-written: it has no .metadata"),
        (_lose_a_rank, "step-4"),
        (lambda run: shutil.rmtree(run / "checkpoint/step-2"), "checkpoint/step-2 is missing"),
        (lambda run: _write_checkpoint(run, 3), "checkpoint/step-3 is not in the reference"),
        (lambda run: (run / "checkpoint/old").mkdir(), "checkpoint/old is left"),
        (lambda run: (run / "checkpoint/step-4/.metadata.tmp").touch(), "checkpoint/step-4/.metadata.tmp is left"),
        (lambda run: (run / "resolved.toml.17.tmp").touch(), "resolved.toml.17.tmp is left"),
    ],
)
def test_a_damage_is_named(runs, damage, problem):
    damage(runs[1])
    problems = compare(*runs).problems
    assert [line for line in problems if problem in line], problems


def test_a_tolerance_forgives_as_much_and_no_more(runs):
    _write_checkpoint(runs[1], 4, w=_states(4)["w"] * (1 + 1e-4))
    _write_records(runs[1], *map(_record, (1, 2, 3)), _record(4, loss=6.0 * (1 + 2e-4)))
    assert compare(*runs, tolerance=1e-3).problems == []
    assert compare(*runs, tolerance=1e-3).deviation == pytest.approx(2e-4, rel=1e-3)
    assert len(compare(*runs, tolerance=1e-5).problems) == 2


def test_a_checkpoint_is_complete_with_its_metadata_and_the_file_of_every_rank(runs):
    folder = runs[1] / "checkpoint"
    assert complete_checkpoints(folder, 1) == {2, 4} and complete_checkpoints(folder, 2) == set()
    (folder / "step-4/__1_0.distcp").touch()
    assert complete_checkpoints(folder, 2) == {4}
    _half_write(runs[1])
    assert complete_checkpoints(folder, 1) == {4} and complete_checkpoints(folder / "nothing", 1) == set()
