import json
import subprocess
import sys

import pytest

from nitp_titan.config import UserError
from nitp_titan.report import moving_average, phases, read_run, write_report


def _run_folder(folder, nitp=None, steps=100):
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, steps + 1):
            record = {
                "step": step,
                "ntp_loss": 8.0 - step / 50,
                "tokens": step * 512,
                "tokens_per_second": 1000.0 + step,
                "memory_gib": 1.5,
            }
            if nitp:
                record["nitp_loss"] = nitp(step)
            stream.write(json.dumps(record) + "\n")
    return folder


def _three_phases(step: int) -> float:
    if step <= 10:
        return 1.0 - 0.099 * step
    return 0.01 + 0.3 * (step - 10) / 40 if step <= 50 else 0.31 - 0.2 * (step - 50) / 50


def test_final_figures_are_means_over_the_last_tenth(tmp_path):
    run = read_run("ntp", _run_folder(tmp_path / "ntp"))
    assert run.final("ntp_loss") == pytest.approx(sum(8.0 - step / 50 for step in range(91, 101)) / 10)
    assert run.final("nitp_loss") is None


def test_phases_finds_collapse_hump_and_end():
    steps = list(range(1, 101))
    marks = phases(steps, [_three_phases(step) for step in steps])
    assert marks["start"] == (1, pytest.approx(0.901))
    assert 9 <= marks["collapse"][0] <= 12 and marks["collapse"][1] < 0.1
    assert 48 <= marks["hump"][0] <= 52 and marks["hump"][1] == pytest.approx(0.3, abs=0.02)
    assert marks["end"] == (100, pytest.approx(0.11, abs=0.01))


def test_the_moving_average_keeps_constants_and_length():
    assert moving_average([2.0] * 7, 3) == [2.0] * 7
    assert moving_average([0.0, 3.0, 6.0], 3) == [1.5, 3.0, 4.5]


def test_the_report_shows_both_arms(tmp_path):
    runs = [
        read_run("ntp", _run_folder(tmp_path / "ntp")),
        read_run("nitp", _run_folder(tmp_path / "nitp", _three_phases)),
    ]
    table = write_report(runs, tmp_path / "report")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0][:5] == ["run", "steps", "tokens", "NTP loss", "NITP loss"]
    assert rows[2][:5] == ["ntp", "100", "51,200", f"{runs[0].final('ntp_loss'):.4f}", "-"]
    assert rows[3][4] == f"{runs[1].final('nitp_loss'):.4f}"
    text = (tmp_path / "report/report.md").read_text()
    assert table in text and "collapses to" in text and "losses.png" in text
    assert (tmp_path / "report/losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        read_run("x", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no steps"):
        read_run("x", tmp_path)


def test_the_compare_script_writes_the_report_and_refuses_what_is_no_run(tmp_path, project_folder):
    _run_folder(tmp_path / "a", _three_phases)
    command = [sys.executable, "scripts/compare.py", "--out", str(tmp_path / "out"), "--run"]
    done = subprocess.run([*command, f"a={tmp_path / 'a'}"], capture_output=True, text=True)
    assert done.returncode == 0 and "| a | 100 |" in done.stdout and (tmp_path / "out/report.md").exists()
    failed = subprocess.run([*command, f"b={tmp_path}"], capture_output=True, text=True)
    assert (
        failed.returncode == 1
        and failed.stderr == f"error: {tmp_path} has no metrics.jsonl; it is not the folder of a training run.\n"
    )
