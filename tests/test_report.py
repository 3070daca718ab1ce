"""The comparison of runs: arms, fairness, statistics, page."""

import json
import math
import random
import subprocess
import sys

import pytest
from report_runs import three_phases, write_run

from nitp_titan.config import UserError
from nitp_titan.report import drawing, figures
from nitp_titan.report.page import Report
from nitp_titan.report.runs import common_step, differences, read_arms
from nitp_titan.report.stats import bootstrap_interval, difference, FIGURES, phases, smoothed

BY_NAME = {figure.name: figure for figure in FIGURES}


@pytest.fixture
def seeds(tmp_path):
    """Three seeds of NTP and of NITP, whose NTP losses are lower by 0.1, 0.2 and 0.3."""
    for seed in (1, 2, 3):
        write_run(tmp_path / f"ntp/seed_{seed}", seed=seed)
        write_run(tmp_path / f"nitp/seed_{seed}", seed=seed, nitp=three_phases, better=0.1 * seed)
    return tmp_path


def arms_of(*arguments):
    arms, problems = read_arms([str(argument) for argument in arguments])
    assert problems == []
    return arms


def test_final_figures_are_means_over_the_last_tenth_or_last_values(tmp_path):
    (arm,) = arms_of(write_run(tmp_path / "ntp"))
    run = arm.runs[0]
    assert BY_NAME["NTP loss"].of(run, 100) == pytest.approx(sum(8.01 - step / 50 for step in range(91, 101)) / 10)
    assert BY_NAME["NTP loss"].of(run, 50) == pytest.approx(sum(8.01 - step / 50 for step in range(46, 51)) / 5)
    assert BY_NAME["validation NTP loss"].of(run, 80) == pytest.approx(7.9 - 75 / 50)
    assert BY_NAME["NITP loss"].of(run, 100) is None
    # The first step pays for the start.
    assert BY_NAME["tokens/s"].of(run, 100) == 1051.0


def test_phases_finds_collapse_hump_and_end():
    steps = list(range(1, 101))
    marks = phases(steps, [three_phases(step) for step in steps])
    assert marks["start"] == (1, pytest.approx(0.901))
    assert 9 <= marks["collapse"][0] <= 12 and marks["collapse"][1] < 0.1
    assert 48 <= marks["hump"][0] <= 52 and marks["hump"][1] == pytest.approx(0.3, abs=0.02)
    assert marks["end"] == (100, pytest.approx(0.11, abs=0.01))


def test_a_loss_that_does_not_collapse_has_no_phases():
    assert phases(range(50), [0.01 * step for step in range(50)]) is None
    assert phases([1, 2], [1.0, 0.1]) is None


def test_a_loss_that_stays_down_has_no_hump_and_no_phases():
    """As with the same position: the loss falls to 0.01 and stays there, give or take a third."""
    assert phases(range(200), [max(0.01, 1 - step / 20) + 0.003 * (step % 50 == 0) for step in range(200)]) is None


def test_a_collapse_in_a_long_run_is_not_smoothed_away():
    """The paper's scale: 40,000 steps, logged every tenth; the low lasts from step 40 to step 200."""
    steps = list(range(10, 40_010, 10))
    values = [1.0 if s < 40 else 0.02 if s <= 200 else min(0.25, 0.02 + s / 8000) - 0.2 * s / 40_000 for s in steps]
    marks = phases(steps, values)
    assert 40 <= marks["collapse"][0] <= 200 and marks["collapse"][1] == pytest.approx(0.02)
    # The top is at step 1,840; the average spans 800 steps on either side.
    assert 1840 - 800 <= marks["hump"][0] <= 1840 + 800 and marks["hump"][1] == pytest.approx(0.24, abs=0.01)


def test_the_moving_average_is_the_mean_of_its_neighbours():
    assert smoothed([1.0] * 200) == pytest.approx([1.0] * 200)
    values = [random.Random(3).random() for _ in range(200)]
    # A share of 4% of 200: four neighbours on each side, fewer at the start and at the end.
    assert smoothed(values)[100] == pytest.approx(sum(values[96:105]) / 9)
    assert smoothed(values)[:4] == pytest.approx(values[:4]) and smoothed(values)[9] == pytest.approx(
        sum(values[7:12]) / 5
    )
    assert smoothed(values)[199] == pytest.approx(sum(values[195:]) / 5)


def test_a_value_that_is_not_finite_stays_alone():
    values = smoothed([2.0] * 50 + [math.nan] + [4.0] * 50)
    assert math.isnan(values[50]) and [values[49], values[51]] == [2.5, 3.5] and values[-1] == 4.0
    assert phases(list(range(3)), [1.0, 0.1, math.nan]) is None


def test_runs_that_differ_in_their_seed_only_are_one_arm_and_ntp_comes_first(seeds):
    arms = arms_of(seeds / "nitp", seeds / "ntp")
    assert [(arm.name, len(arm.runs), arm.is_ntp) for arm in arms] == [("ntp_debug", 3, True), ("nitp_debug", 3, False)]
    named = arms_of(f"b={seeds / 'nitp/seed_1'}", f"a={seeds / 'ntp'}")
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in named] == [("a", [1, 2, 3]), ("b", [1])]


def test_two_arms_of_one_recipe_take_the_names_of_their_folders(tmp_path):
    write_run(tmp_path / "small")
    write_run(tmp_path / "large", training={"global_batch_size": 8})
    assert [arm.name for arm in arms_of(tmp_path / "small", tmp_path / "large")] == ["ntp_debug", "large"]


def test_differences_are_paired_by_seed(seeds):
    ntp, nitp = arms_of(seeds / "ntp", seeds / "nitp")
    found = difference(nitp, ntp, BY_NAME["validation NTP loss"], 100)
    assert found.value == pytest.approx(-0.2) and found.pairs == 3 and found.shown
    assert found.interval == (pytest.approx(-0.3), pytest.approx(-0.1))
    assert difference(nitp, ntp, BY_NAME["NITP loss"], 100) is None


def test_only_common_seeds_are_paired(seeds):
    (seeds / "ntp/seed_2/metrics.jsonl").unlink()
    ntp, nitp = arms_of(seeds / "ntp", seeds / "nitp")
    found = difference(nitp, ntp, BY_NAME["validation NTP loss"], 100)
    assert found.pairs == 2 and found.interval is None and not found.shown
    assert any(
        "the seeds differ (ntp_debug: 1, 3; nitp_debug: 1, 2, 3)" in w for w in differences([ntp, nitp]).warnings
    )


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    """Twenty values from a normal distribution, 200 times: a 95% interval covers its mean about 190 times."""
    generator = random.Random(5)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval([generator.gauss(3.0, 1.0) for _ in range(20)])
        covered += low <= 3.0 <= high
    assert 175 <= covered <= 198
    assert bootstrap_interval([1.0, 2.0]) is None


@pytest.mark.parametrize(
    "table, key, value, reason",
    [
        ("dataloader", "dataset_path", "other.jsonl", "the arms see other data or another order"),
        ("training", "global_batch_size", 8, "the arms see different numbers of tokens"),
        ("training", "seq_len", 256, "the arms see other data or another order"),
    ],
)
def test_an_unfair_comparison_is_called_so(tmp_path, table, key, value, reason):
    arms = arms_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", nitp=three_phases, **{table: {key: value}}))
    found = differences(arms)
    assert list(found.others) == [f"{table}.{key}"]
    assert found.warnings == [f"{table}.{key} differs: {reason}."]


def test_a_fair_comparison_differs_in_nitp_alone(seeds):
    found = differences(arms_of(seeds / "ntp", seeds / "nitp"))
    assert found.nitp == {"nitp.weight": [0.0, 1.0]} and found.others == {} and found.warnings == []


def test_harmless_settings_are_named_without_a_warning(tmp_path):
    arms = arms_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", nitp=three_phases, metrics={"log_freq": 5}))
    found = differences(arms)
    assert list(found.others) == ["metrics.log_freq"] and found.warnings == []


def test_a_run_that_is_still_going_is_compared_as_far_as_it_is(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", nitp=three_phases, steps=60)
    arms, problems = read_arms([str(tmp_path / "a"), str(tmp_path / "b")])
    assert problems == [f"{tmp_path / 'b'}: at step 60 of 100; it is compared as far as it is."]
    assert common_step(arms) == 60
    assert "the runs are at steps 60 to 100: figures are compared at 60." in differences(arms).warnings
    report = Report(arms, problems)
    header, rows = report.final_table()
    assert [row[header.index("tokens")] for row in rows] == ["30,720", "30,720"]
    assert rows[0][header.index("NTP loss")] == f"{8.01 - 57.5 / 50:.4f}"


def test_damaged_files_are_named_and_the_rest_is_drawn(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", nitp=three_phases)
    lines = (tmp_path / "b/metrics.jsonl").read_text().splitlines()
    lines[4], lines[9], lines[-1] = "{broken", "[1, 2]", lines[-1][:20]
    (tmp_path / "b/metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "b/resolved.json").write_text("{")
    (tmp_path / "a/geometry.jsonl").write_bytes(b"\xff\xfe nothing\n")
    (tmp_path / "empty").mkdir()
    arms, problems = read_arms([str(tmp_path / name) for name in ("a", "b", "empty", "missing")])
    assert problems == [
        f"{tmp_path}/empty has no metrics.jsonl; it is not the folder of a training run.",
        f"{tmp_path}/missing does not exist.",
        f"{tmp_path}/b: metrics.jsonl: 2 of 100 lines are no records (5, 10); they are left out.",
        f"{tmp_path}/b: resolved.json is damaged: its settings are unknown.",
    ]
    report = Report(arms, problems)
    assert any("the settings of b are unknown" in warning for warning in report.settings.warnings)
    report.write(tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert all(problem in text for problem in problems)
    assert (tmp_path / "out/nitp_loss.png").exists()


@pytest.mark.parametrize(
    "record", ['{"step": 2, "ntp_loss": NaN, "lr": null}', '{"step": 2, "lr": 0.1}', '{"step": 2}']
)
def test_a_run_that_logged_hardly_anything_is_reported_too(tmp_path, record):
    write_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/metrics.jsonl").write_text('{"step": 1}\n' + record)
    for runs in (["a", "b"], ["b"]):
        report = Report(*read_arms([str(tmp_path / name) for name in runs]))
        report.write(tmp_path / "out")
        assert "b: no resolved.json: its settings are unknown." in (tmp_path / "out/report.md").read_text()


def test_nothing_to_compare_is_an_error_with_all_reasons(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").write_text("")
    with pytest.raises(UserError) as error:
        read_arms([str(tmp_path / "empty"), str(tmp_path / "missing")])
    assert str(error.value) == (
        f"there is no run to compare. {tmp_path}/empty/metrics.jsonl holds no step; the run is left out. "
        f"{tmp_path}/missing does not exist."
    )


def test_one_run_per_arm_claims_nothing(tmp_path):
    arms = arms_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", nitp=three_phases, better=0.5))
    first, phase = Report(arms).sentences()
    assert first.startswith("nitp_debug against ntp_debug: validation NTP loss -0.5000; probe effective rank +0.5;")
    assert first.endswith("With one run per arm all of this may be chance: the data show nothing.")
    assert phase.startswith("NITP loss of nitp_debug (moving average): 0.901 at the first step, collapses to")


def test_three_seeds_say_what_is_shown_and_what_is_not(seeds):
    (first, *_) = Report(arms_of(seeds / "ntp", seeds / "nitp")).sentences()
    assert first == (
        "nitp_debug against ntp_debug, 3 seeds: the data show a difference in validation NTP loss -0.2000 (-0.3000 to "
        "-0.1000); probe effective rank +0.2 (+0.1 to +0.3), and they show none in probe cosine +0.000 (+0.000 to "
        "+0.000)."
    )


def test_the_tables_have_mean_range_difference_and_overhead(seeds):
    report = Report(arms_of(seeds / "ntp", seeds / "nitp"))
    header, rows = report.final_table()
    cells = [dict(zip(header, row)) for row in rows]
    assert cells[0]["validation NTP loss"] == "5.9000 ± 0.0000" and cells[1]["validation NTP loss"] == "5.7000 ± 0.1000"
    assert cells[0]["overhead"] == "-" and cells[1]["overhead"] == "+0.0%"
    header, rows = report.difference_table()
    assert ["validation NTP loss", "nitp_debug", "-0.2000", "-0.3000 to -0.1000", "3", "show a difference"] in rows
    assert not any(row[0] in ("tokens/s", "NITP loss") for row in rows)


def test_every_figure_is_a_file_and_in_the_page(seeds):
    report = Report(arms_of(seeds / "ntp", seeds / "nitp"))
    report.write(seeds / "out")
    names = [one.name for one in report.drawings]
    assert {"ntp_loss", "validation_ntp_loss", "nitp_loss", "effective_rank", "cosine", "spectra"} < set(names)
    assert {"layers_effective_rank", "learning_rate", "throughput", "probe_effective_rank"} < set(names)
    for name in names:
        assert (seeds / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (seeds / f"out/{name}.svg").read_text()
    page, text = (seeds / "out/index.html").read_text(), (seeds / "out/report.md").read_text()
    assert page.count("<svg ") == page.count("<figcaption>") == len(names)
    assert all(f"({name}.png)" in text for name in names)
    assert (seeds / "out/overview.png").exists()


def test_the_page_asks_for_nothing_and_takes_the_colours_of_the_reader(seeds):
    page = Report(arms_of(seeds / "ntp", seeds / "nitp")).html()
    for request in ("<script", "src=", "@import", "url(http"):
        assert request not in page
    hrefs = {part.split('"')[0] for part in page.split('href="')[1:]}
    assert all(href.startswith(("#", "data:")) for href in hrefs)
    assert "prefers-color-scheme: dark" in page and "currentColor" in page
    assert drawing._INK not in page and drawing._GRID not in page


def test_names_cannot_break_the_page(tmp_path):
    write_run(tmp_path / "a")
    page = Report(arms_of(f'<b>&"x={tmp_path / "a"}')).html()
    assert "<b>&" not in page.replace("<b>NTP", "") and "&lt;b&gt;&amp;" in page


def test_spectra_are_drawn_at_the_measured_steps_nearest_to_those_asked_for(seeds):
    arms = arms_of(seeds / "ntp", seeds / "nitp")
    assert figures.chosen_steps(arms) == [100, 25, 1]
    assert figures.chosen_steps(arms, [45, 80]) == [75, 50]


def test_the_compare_script_writes_the_report_and_refuses_what_is_no_run(seeds, project_folder):
    command = [sys.executable, "scripts/compare.py", "--out", str(seeds / "out")]
    done = subprocess.run([*command, str(seeds / "ntp"), str(seeds / "nitp")], capture_output=True, text=True)
    assert done.returncode == 0 and "| ntp_debug | 3 | 51,200 |" in done.stdout, done.stderr
    assert (seeds / "out/index.html").exists()
    failed = subprocess.run([*command, str(seeds / "nowhere")], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == f"error: there is no run to compare. {seeds / 'nowhere'} does not exist.\n"
    (seeds / "file").write_text("")
    failed = subprocess.run([*command[:3], str(seeds / "file"), str(seeds / "ntp")], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: --out ") and failed.stderr.count("\n") == 1


def test_the_records_of_a_training_run_are_what_the_report_reads(tmp_path, assets):
    """Not made-up ones: names of files, states and settings are those of a run."""
    from helpers import make_config, train

    train(make_config(tmp_path / "run", geometry={"enable": True, "interval": 1, "layers": True}))
    (arm,) = read_arms([str(tmp_path / "run")])[0]
    names = {one.name for one in figures.drawings([arm])}
    assert {"ntp_loss", "nitp_loss", "effective_rank", "cosine", "target_effective_rank", "spectra"} < names
    assert {"layers_effective_rank", "learning_rate", "throughput"} < names
    assert arm.runs[0].seed == 42 and not arm.is_ntp
    assert json.loads((tmp_path / "run/resolved.json").read_text())["nitp"]["weight"] == 1.0
