"""The page about the cost: its sentences follow from the numbers."""

import copy
import json
import subprocess
import sys

import pytest

from nitp_titan.config import UserError
from nitp_titan.overhead import report


def _arm(matmul, ratio, peak):
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
            "arms": {
                "NTP": _arm(100e6, 1.0, 500e6),
                "NITP": _arm(102e6, 1.025, 505e6),
                "MTP": _arm(130e6, 1.4, 900e6),
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
    assert "NITP's time is 1.25 times its FLOPs, within the bar of 1.3." in text
    assert "MTP adds 16.0 times as much time as NITP (bar: 8)." in text
    assert "With the loss in one chunk: 800 MB and 832 MB (+4.00%)." in text
    assert "Nothing of this was run on a GPU." in text


def test_a_missed_bar_is_said():
    slow = copy.deepcopy(MEASURED)
    slow["settings"]["float32, eager"]["arms"]["NITP"]["ratio"]["median"] = 1.03
    assert "NITP's time is 1.50 times its FLOPs, above the bar of 1.3." in report.tables({"measured": slow})


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
        [sys.executable, "scripts/bench_overhead.py", *arguments, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={"PATH": "", **environment},
    )
    assert done.returncode != 0 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
