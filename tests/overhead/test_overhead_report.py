"""The page about the cost: its sentences follow from the numbers."""

import copy
import json
import random
import re
import statistics
import subprocess
import sys

import pytest
from overhead import report

from nitp_titan import difference
from nitp_titan.difference import bootstrap_interval
from nitp_titan.errors import UserError


def _variant(matmul, ratio, peak):
    return {
        "seconds": {"median": 2.0 * ratio, "quartiles": [1.9 * ratio, 2.1 * ratio]},
        "ratio": {
            "median": ratio,
            "quartiles": [ratio - 0.01, ratio + 0.01],
            "interval": [ratio - 0.002, ratio + 0.002],
        },
        "tokens_per_second": 1024 / (2.0 * ratio),
        "mfu": None,
        "matmul_flops": matmul,
        "attention_flops": 20e6,
        "peak_bytes": peak,
        "chunks": 8,
    }  # fmt: skip


MEASURED = {
    "machine": {"device": "CPU", "processor": "x86_64, AVX512", "cores": 2, "date": "2026-01-01", "torch": "2.14.1"},
    "recipe": "overhead/nitp_ratio_9b",
    "train_config": "cpu",
    "seq_len": 512,
    "batch_size": 2,
    "settings": {
        "float32, eager": {
            "tokens_per_step": 1024,
            "rounds": 60,
            "variants": {
                "NTP": _variant(100e6, 1.0, 500e6),
                "NITP": _variant(102e6, 1.025, 505e6),
                "MTP": _variant(130e6, 1.4, 900e6),
            },
        }
    },
    "unchunked": {"NTP": 800e6, "NITP": 832e6},
}


def test_the_tables_say_what_nitp_adds_and_whether_it_is_within_the_bars():
    text = report.tables({"measured": MEASURED})
    nitp = next(line for line in text.splitlines() if line.startswith("| NITP |"))
    cells = [cell.strip() for cell in nitp.strip("|").split("|")]
    assert cells == ["NITP", "102.0M", "+2.00%", "+1.67%", "2.050 s", "+2.50%", "+1.50% to +3.50%",
                     "+2.30% to +2.70%", "500", "-", "505.0 MB", "+1.00%"]  # fmt: skip
    # The noise leaves no doubt that 2.5% is above 0, and some that it is below 1.3 times 2%: 2.6%.
    assert "NITP's time is +2.50% (+2.30% to +2.70%). The noise hides what it is: the interval includes the bar" in text
    assert "With the loss in one chunk: 800 MB and 832 MB (+4.00%)." in text
    assert "Nothing of this was run on a GPU." in text


def _measured(nitp: list[float], mtp: list[float], *, counted: bool = True) -> str:
    """The tables of a measurement with these ratios of neighbouring steps; on a GPU no FLOPs are counted."""
    part = copy.deepcopy(MEASURED)
    setting = part["settings"]["float32, eager"]
    setting["rounds"] = len(nitp)
    for name, ratios in (("NITP", nitp), ("MTP", mtp)):
        interval = bootstrap_interval(ratios, statistics.median)
        setting["variants"][name]["ratio"] |= {"median": statistics.median(ratios), "interval": interval}
    for variant in () if counted else setting["variants"].values():
        variant["matmul_flops"] = variant["attention_flops"] = None
    return report.tables({"measured": part})


def _ratios(mean: float, noise: float, *, rounds: int = 100, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [1 + generator.gauss(mean, noise) for _ in range(rounds)]


MTP = _ratios(0.3, 0.01, seed=1)


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        (_ratios(0.02, 0.005), r"times its FLOPs, within the bar of 1.3 times. MTP adds \d+\.\d times as much time "),
        (_ratios(-0.02, 0.005), r"NITP's time is -\d\.\d\d% \([^)]*\), within the bar of 1.3 times."),
        (_ratios(0.05, 0.005), r"times its FLOPs, above the bar of 1.3 times. MTP adds "),
        (_ratios(0.02, 0.2), r"The noise hides what it is: the interval includes 0 and the bar, \+2.60%. About "),
        (_ratios(0.002, 0.02), r"The noise hides what it is: the interval includes 0. About "),
        (_ratios(0.026, 0.01), r"The noise hides what it is: the interval includes the bar, \+2.60%. About "),
    ],
)
def test_a_bar_is_judged_only_where_the_interval_leaves_it_and_zero_out(ratios, said):
    text = _measured(ratios, MTP)
    assert len(re.findall(said, text)) == 1
    assert ("the bar of 1.3" in text) == ("The noise hides" not in text)
    assert "-0." not in "".join(re.findall(r"[-0-9.]+ times", text))


def test_a_difference_that_rounds_to_nothing_has_no_sign_of_less():
    measured = copy.deepcopy(MEASURED)
    measured["settings"]["float32, eager"]["variants"]["NITP"] = _variant(100e6, 1.025, 500e6 - 1)
    row = next(line for line in report.tables({"measured": measured}).splitlines() if line.startswith("| NITP |"))
    assert "+0.00%" in row and "-0.00%" not in row


def test_the_measurement_that_was_said_to_be_within_the_bar_is_hidden_in_noise():
    """-0.6% (-3.5% to +5.8%) over 60 rounds: half a width of 4.65% must fall below 0.3 times the FLOPs' 2%, 0.6%."""
    part = copy.deepcopy(MEASURED)
    part["settings"]["float32, eager"]["variants"]["NITP"]["ratio"] |= {"median": 0.994, "interval": [0.965, 1.058]}
    text = report.tables({"measured": part})
    assert "includes 0 and the bar, +2.60%. About 7,355 rounds would show it." in text
    rounds = 60 * (4.65 / 0.6 * 2.8 / 1.96) ** 2
    assert rounds == pytest.approx(7355, abs=1)
    assert "times its FLOPs" not in text and "MTP adds" not in text


def test_the_rounds_grow_with_the_square_of_the_width():
    wide, wider = (report.rounds_to_show(100, (-w, w), distance=0.02, gap=0.006) for w in (0.1, 0.2))
    assert wider / wide == pytest.approx(4, rel=1e-3)


def test_as_many_rounds_as_it_says_do_show_it(monkeypatch):
    """For a value where the FLOPs are; with a tenth of them the noise hides it still."""
    monkeypatch.setattr(difference, "_RESAMPLES", 200)
    said = re.search(r"About ([\d,]+) rounds", _measured(_ratios(0.02, 0.05), MTP))
    rounds = int(said[1].replace(",", ""))
    assert 300 < rounds < 3000
    enough, few = (
        [_measured(_ratios(0.02, 0.05, rounds=count, seed=seed), MTP) for seed in range(20)]
        for count in (rounds, rounds // 10)
    )
    assert sum("within the bar of 1.3" in text for text in enough) >= 14
    assert sum("The noise hides" in text for text in few) >= 16


def test_a_value_on_a_border_needs_more_rounds_than_anybody_has():
    assert report.rounds_to_show(100, (-0.001, 0.001), distance=0.0, gap=0.006) is None
    assert report.rounds_to_show(100, (-0.001, 0.001), distance=1e-9) is None


def test_without_counted_flops_only_zero_is_judged():
    text = _measured(_ratios(0.02, 0.005), MTP, counted=False)
    assert re.search(r"NITP's time is \+\d\.\d\d% \([^)]*\)\. MTP adds ", text)
    assert "the interval includes 0. About " in _measured(_ratios(0.001, 0.05), MTP, counted=False)


def test_the_times_of_mtp_are_not_judged_where_noise_decides():
    text = _measured(_ratios(0.02, 0.005), _ratios(0.16, 0.1))
    assert "The noise hides on which side of the bar it is. About " in text


def test_parts_that_were_run_before_stay(tmp_path):
    files = report.write(report.merged(tmp_path, "measured", MEASURED), tmp_path)
    names = {path.name for path in files}
    assert {"overhead.json", "overhead.md", "overhead.png", "measured.png", "measured.svg"} <= names
    again = report.merged(tmp_path, "growth", {"seq_len": []})
    assert again == {"measured": MEASURED, "growth": {"seq_len": []}}
    assert "# What NITP costs" in (tmp_path / "overhead.md").read_text()
    assert json.loads((tmp_path / "overhead.json").read_text()) == {"measured": MEASURED}


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "overhead.json").write_text('{"measured": ')
    with pytest.raises(UserError, match=r"overhead.json cannot be read: .* Remove it, or choose another folder"):
        report.merged(tmp_path, "measured", MEASURED)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--rounds", "1"], {}, "error: --rounds 1: it must be at least 3."),
        (
            ["--recipe", "dense/nitp_2c"],
            {},
            "error: dense/nitp_2c is not among the recipes. Did you mean 'dense/nitp_2b'?",
        ),
        (["--only", "growth"], {"WORLD_SIZE": "2"}, "error: without torchrun: one process"),
    ],
)
def test_a_mistake_is_one_line(arguments, environment, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/overhead", *arguments, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={"PATH": "", **environment},
    )
    assert done.returncode != 0 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
