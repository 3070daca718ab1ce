"""A stand-in for training, which takes half a second, is killed: what hits a moment, and what is noticed."""

import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from chaos import moments
from chaos.killed_run import KilledRun
from chaos.moments import MOMENTS
from chaos.trials import Trial

# Fifteen steps, a checkpoint after every third, of which two are kept; the second argument is a fault.
_STAND_IN = """
import shutil, sys, time
from pathlib import Path

folder, fault = Path(sys.argv[1], "run/checkpoint"), sys.argv[2]
complete = sorted(int(path.parent.name[5:]) for path in folder.glob("step-*/.metadata"))
found = sorted(int(path.name[5:]) for path in folder.glob("step-*"))
first = complete[-1:]
if fault == "loads the oldest":
    first = complete[:1]
if fault == "loads a half-written one":
    first = found[-1:]
if fault == "starts afresh":
    first = []
if fault == "fails" and found:
    print("error: this folder is not mine")
    sys.exit(1)
if fault == "removes the newest" and complete:
    shutil.rmtree(folder / f"step-{complete[-1]}")
    sys.exit()
time.sleep(0.2)
print(f"Loading the checkpoint from {folder}/step-{first[0]}." if first else "a fresh start")
print("Training starts at step", flush=True)
for step in range((first or [0])[0] + 1, 16):
    time.sleep(0.04)
    print(f"INFO - step {step}/15  loss 1.0", flush=True)
    if step % 3 == 0:
        new = folder / f"step-{step}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        (new / "__0_0.distcp").touch()
        time.sleep(0.05)
        (new / ".metadata").touch()
        steps = sorted(int(path.name[5:]) for path in folder.glob("step-*"))
        for old in steps[:-2]:
            for path in list((folder / f"step-{old}").iterdir()):
                path.unlink()
                time.sleep(0.001)
            (folder / f"step-{old}").rmdir()
time.sleep(0.2)
"""


@pytest.fixture(autouse=True)
def few_files(monkeypatch):
    monkeypatch.setattr(moments, "_BALLAST", 100)


def _killed(tmp_path, *names: str, fault: str = "none") -> Trial:
    """A trial whose kills hit: like a campaign it tries again what a busy machine made miss."""
    for seed in range(4):
        folder = tmp_path / f"attempt_{seed}"
        folder.mkdir(parents=True)
        command = [sys.executable, "-c", _STAND_IN, str(folder), fault]
        trial = Trial(1)
        KilledRun(folder, command, 1, [3, 6, 9, 12, 15], {}, {}, random.Random(seed)).go(trial, list(names))
        if trial.hit:
            break
    return trial


def _together(tmp_path, kills: list[tuple[str, str]]) -> list[Trial]:
    """Trials of a fault and a moment each, side by side, for they mostly wait."""
    folders = [tmp_path / str(number) for number in range(len(kills))]
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda folder, kill: _killed(folder, kill[1], fault=kill[0]), folders, kills))


def test_each_moment_is_hit_and_the_next_start_resumes(tmp_path):
    names = [name for name in MOMENTS if name != "during export"]
    for moment, trial in zip(names, _together(tmp_path, [("none", name) for name in names])):
        assert trial.problems == [] and trial.survived and trial.hit and trial.starts == 2, str(trial)
        kill = trial.kills[0]
        assert kill.moment == moment
        if moment in ("before a checkpoint", "during a checkpoint write"):
            assert trial.loaded == [None, kill.step - 3 or None], str(trial)
        if moment in ("after a checkpoint", "during the purge"):
            assert trial.loaded == [None, kill.step], str(trial)


def test_a_moment_that_is_over_sooner_than_in_the_reference_is_killed_at_its_end(tmp_path):
    command = [sys.executable, "-c", _STAND_IN, str(tmp_path), "none"]
    checkpoints = [3, 6, 9, 12]
    lengths = {("during a checkpoint write", step): 60.0 for step in checkpoints}
    trial = Trial(1)
    run = KilledRun(tmp_path, command, 1, checkpoints, lengths, {}, random.Random(0))
    run.go(trial, ["during a checkpoint write"])
    assert trial.problems == [] and trial.starts == 2 and trial.kills[0].seconds < 30, str(trial)


def test_a_kill_in_every_start_but_the_last(tmp_path):
    trial = _killed(tmp_path, "first step", "during a checkpoint write", "last step")
    assert trial.problems == [] and trial.hit and trial.starts == 4, str(trial)
    assert trial.loaded[0] is None and trial.loaded[1] is None


def test_a_restart_that_does_wrong_is_lost(tmp_path):
    faults = {
        ("loads the oldest", "during the purge"): r"start 2 loaded step \d+, but that of step (9|12) was complete",
        ("loads a half-written one", "during a checkpoint write"): r"start 2 loaded step \d+, but (that|none) ",
        ("starts afresh", "last step"): r"start 2 loaded no checkpoint, but that of step \d+ was complete",
        ("fails", "last step"): r"start 2 ended with status 1: error: this folder is not mine",
        ("removes the newest", "last step"): r"start 2: the checkpoint of step \d+ is gone",
    }
    for trial, problem in zip(_together(tmp_path, list(faults)), faults.values()):
        assert not trial.survived and re.match(problem, trial.problems[0]), f"{trial} {trial.problems}"


def test_one_seed_means_the_same_kills_at_steps_that_are_ahead(tmp_path):
    def drawn(seed: int, newest: int | None = None):
        run = KilledRun(tmp_path, [], 2, [3, 6, 9, 12], {}, {}, random.Random(seed))
        return [run.drawn("before a checkpoint", newest) for _ in range(20)]

    assert drawn(5) == drawn(5) != drawn(6)
    assert {kill.step for kill, _, _ in drawn(5)} == {3, 6, 9, 12}
    assert {kill.step for kill, _, _ in drawn(5, newest=6)} == {9, 12}
    assert {kill.victim for kill, _, _ in drawn(5)} == {"rank 0", "rank 1"}
    assert {(kill.moment, kill.step) for kill, _, _ in drawn(5, newest=12)} == {("any", 0)}, "no checkpoint is ahead"
