"""Real training and a real export, killed and started again; the options and the table."""

import contextlib
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from readme import documented

from chaos.campaign import Campaign, CampaignSettings
from chaos.trials import (
    by_moment,
    Kill,
    table,
    Trial,
)
from nitp_titan.errors import UserError


def test_training_and_export_survive_kills_and_end_as_if_nothing_had_happened(assets, tmp_path):
    campaign = Campaign(CampaignSettings(), tmp_path / "chaos")
    campaign.run_reference()
    assert 0 < campaign.lengths["during a checkpoint write", 6] < campaign.lengths["any", 0]

    def killed(moments: list[str]) -> Trial:
        """A trial whose kills came: like a campaign it tries again what a busy machine made miss."""
        for seed in range(4):
            trial = campaign.trial(10 * len(moments) + seed, moments, random.Random(seed))
            assert trial.problems == [] and trial.deviation == 0, (str(trial), trial.problems)
            if all(kill.seconds is not None for kill in trial.kills):
                return trial
        raise AssertionError(str(trial))

    with ThreadPoolExecutor(2) as pool:
        trials = list(pool.map(killed, [["first step", "during a checkpoint write"], ["during export"]]))
    assert trials[0].starts == 3 and trials[1].starts == 2
    assert not list(campaign.out.glob("trial_*")), "only what was lost is kept"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"moments": ("during the weekend",)}, "--moment 'during the weekend': there is no such moment."),
        ({"moments": ("first stop",)}, "Did you mean 'first step'?"),
        ({"num_ranks": 3}, "--ranks 3: it must be 1, 2 or 4."),
        ({"interval": 1}, "--interval 1: it must be 2 to 15."),
        ({"steps": 11}, "--steps 11: it must be 15 to 999."),
        ({"kills": 0}, "--kills 0: it must be 1 to 10."),
        ({"tolerance": float("nan")}, "--tolerance nan: it must be at least 0 and below 1."),
    ],
)
def test_a_bad_option_is_told_in_one_line(options, message):
    with pytest.raises(UserError) as error:
        CampaignSettings(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_in_use_is_refused_by_the_script_without_a_traceback(tmp_path):
    (tmp_path / "file").touch()
    finished = subprocess.run([sys.executable, "tests/chaos", "--out", str(tmp_path)], capture_output=True, text=True)
    assert finished.returncode == 1 and finished.stdout == ""
    assert finished.stderr == f"error: --out {tmp_path} exists already; choose another folder or remove it.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_campaign_leaves_no_process_behind(tmp_path, number):
    out = tmp_path / "chaos"

    def trainings() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found += [path.parent.name] if f"{out}/reference/run".encode() in path.read_bytes() else []
        return found

    command = [sys.executable, *documented("tests/chaos"), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as campaign:
        limit = time.monotonic() + 60
        while not trainings() and campaign.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        assert trainings()
        campaign.send_signal(number)
        said = campaign.communicate(timeout=60)[1].decode()
    # After Ctrl-C, and after SIGTERM.
    assert campaign.returncode == (130 if number == signal.SIGINT else 1) and "Traceback" not in said
    assert trainings() == []


def test_the_table_counts_kills_by_moment_and_says_how_a_trial_was_lost():
    trials = [
        Trial(1, [Kill("start", 0, "rank 0", hit=True, seconds=1.0)]),
        Trial(2, [Kill("start", 0, "all", hit=True, seconds=1.0)], problems=["a is lost", *["b is lost"] * 9]),
        Trial(3, [Kill("last step", 12, "rank 0", hit=False, seconds=1.0)]),
        Trial(4, [Kill("last step", 12, "rank 0")]),
        Trial(5, [Kill("any", 0, "rank 0")], problems=["start 1 ended"]),
    ]
    assert by_moment(trials) == {
        "start": {"tried": 2, "survived": 1, "lost": 1},
        "missed": {"tried": 2, "survived": 1, "lost": 1},
    }
    assert [trial.survived for trial in trials] == [True, False, True, False, False]
    lines = table(trials).splitlines()
    assert lines[1].split() == ["start", "2", "1", "1"] and lines[3] == "trial 2: a is lost"
    assert lines[-2:] == ["trial 2: and 2 more", "trial 5: start 1 ended"]
    assert table(trials[:1]).endswith("all numbers are equal")
