"""The comparison of runs: variants, fairness, statistics, page."""

import dataclasses
import json
import math
import random
import subprocess
import sys

import pytest
from matplotlib import pyplot
from processes import warm_python
from report_runs import three_phases, write_run
from study.report import MECHANISMS

from nitp_titan.difference import bootstrap_interval
from nitp_titan.errors import UserError
from nitp_titan.report import drawing, plots
from nitp_titan.report.page import Report
from nitp_titan.report.runs import changed_settings, common_steps, read_variants
from nitp_titan.report.stats import (
    difference,
    phases,
    smoothed,
    STATS,
)

BY_NAME = {stat.name: stat for stat in STATS}


@pytest.fixture
def seeds(tmp_path):
    """Three seeds of NTP and of NITP, whose NTP losses are lower by 0.1, 0.2 and 0.3."""
    for seed in (1, 2, 3):
        write_run(tmp_path / f"ntp/seed_{seed}", seed=seed)
        write_run(tmp_path / f"nitp/seed_{seed}", seed=seed, nitp=three_phases, better=0.1 * seed)
    return tmp_path


def variants_of(*arguments):
    variants, problems = read_variants([str(argument) for argument in arguments])
    assert problems == []
    return variants


def value(name, run):
    return BY_NAME[name].value(run, BY_NAME[name].steps([run]))


def test_final_values_are_means_over_the_last_tenth_or_last_values(tmp_path):
    (variant,) = variants_of(write_run(tmp_path / "ntp"))
    run = variant.runs[0]
    assert BY_NAME["NTP loss"].steps([run]) == list(range(91, 101))
    assert value("NTP loss", run) == pytest.approx(sum(8.01 - step / 50 for step in range(91, 101)) / 10)
    assert BY_NAME["validation NTP loss"].steps([run]) == [100]
    assert value("validation NTP loss", run) == pytest.approx(7.9 - 100 / 50)
    assert value("NITP loss", run) is None


def _thinned(folder, name: str, keep) -> None:
    """Leave only those records of a metrics file whose step is kept."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if keep(json.loads(line)["step"])))


def test_values_of_different_steps_never_stand_side_by_side(tmp_path):
    """One variant validates at 1, 25, 50, 75, 100, the other at 1, 50, 100 and its last validation is lost; one logs
    every step, the other every third."""
    a = write_run(tmp_path / "a", validator={"freq": 25})
    b = write_run(tmp_path / "b", nitp=three_phases, better=0.5, validator={"freq": 50})
    _thinned(b, "validation", lambda step: step in (1, 50))
    _thinned(b, "geometry", lambda step: step < 100)
    _thinned(b, "metrics", lambda step: step % 3 == 1)
    report = Report(variants_of(a, b))
    header, rows = report.final_table()
    cells = [dict(zip(header, row)) for row in rows]
    assert [row["validation NTP loss"] for row in cells] == ["6.9000", "6.4000", "50"]
    steps = list(range(1, 101, 3))[-3:]
    means = [f"{first - sum(steps) / 150:.4f}" for first in (8.01, 7.51)]
    assert [row["NTP loss"] for row in cells] == [*means, "94 to 100"]
    assert [row["effective rank"] for row in cells] == ["17.5", "18.0", "75"]
    assert [row["tokens"] for row in cells] == ["51,200", "51,200", "100"]
    _, rows = report.difference_table()
    assert ["validation NTP loss", "50", "nitp_debug", "-0.5000", "-", "1", "may be chance"] in rows
    assert "validation NTP loss -0.5000 at step 50" in report.sentences()[0]
    assert "Output of every layer at step 75." in [each.caption for each in report.drawings]
    # Another interval is not another set of tokens.
    assert report.settings.warnings == [] and list(report.settings.others) == ["[validator] freq"]


def test_a_statistic_without_a_step_in_common_is_named_and_not_compared(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", nitp=three_phases)
    _thinned(a, "validation", lambda step: step in (1, 50))
    _thinned(b, "validation", lambda step: step in (25, 75))
    report = Report(variants_of(a, b))
    assert "validation NTP loss" not in report.final_table()[0]
    assert report.settings.warnings == ["validation NTP loss: the runs have no step in common; it is not compared."]


def test_nothing_that_the_load_of_the_machine_decides_is_compared(seeds):
    """Runs one after the other do not take turns: their speeds say nothing of what a variant costs."""
    report = Report(variants_of(seeds / "ntp", seeds / "nitp"))
    header, rows = report.final_table()
    for words in ("overhead", "tokens/s", "+0.0%"):
        assert words not in header and not any(words in cell for row in rows for cell in row)
    assert "say nothing of what a variant costs: scripts/overhead" in report.markdown()


def test_the_largest_gradient_is_compared_with_the_median_of_an_even_number_too(tmp_path):
    (variant,) = variants_of(write_run(tmp_path / "a", lr_scheduler={"warmup_steps": 0}))
    (spikes,) = {each.value_of for each in MECHANISMS if each.stat == "largest gradient over the median"}
    for norms, ratio in (([1.0, 3.0, 6.0], 2.0), ([1.0, 3.0, 5.0, 8.0], 2.0)):
        records = [record | {"grad_norm": norm} for record, norm in zip(variant.runs[0].records, norms)]
        assert spikes(dataclasses.replace(variant.runs[0], records=records)) == pytest.approx(ratio)


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


def test_runs_that_differ_in_their_seed_only_are_one_variant_and_ntp_comes_first(seeds):
    variants = variants_of(seeds / "nitp", seeds / "ntp")
    assert [(variant.name, len(variant.runs), variant.is_ntp) for variant in variants] == [
        ("ntp_debug", 3, True),
        ("nitp_debug", 3, False),
    ]
    named = variants_of(f"b={seeds / 'nitp/seed_1'}", f"a={seeds / 'ntp'}")
    assert [(variant.name, [run.seed for run in variant.runs]) for variant in named] == [("a", [1, 2, 3]), ("b", [1])]


def test_two_variants_of_one_recipe_take_the_names_of_their_folders(tmp_path):
    write_run(tmp_path / "small")
    write_run(tmp_path / "large", training={"global_batch_size": 8})
    assert [variant.name for variant in variants_of(tmp_path / "small", tmp_path / "large")] == ["ntp_debug", "large"]


def test_differences_are_paired_by_seed(seeds):
    ntp, nitp = variants_of(seeds / "ntp", seeds / "nitp")
    found = difference(nitp, ntp, BY_NAME["validation NTP loss"], [100])
    assert found.value == pytest.approx(-0.2) and found.pairs == 3 and found.excludes_zero
    assert found.interval == (pytest.approx(-0.3), pytest.approx(-0.1))
    assert difference(nitp, ntp, BY_NAME["NITP loss"], [100]) is None


def test_only_common_seeds_are_paired(seeds):
    (seeds / "ntp/seed_2/metrics.jsonl").unlink()
    ntp, nitp = variants_of(seeds / "ntp", seeds / "nitp")
    found = difference(nitp, ntp, BY_NAME["validation NTP loss"], [100])
    assert found.pairs == 2 and found.interval is None and not found.excludes_zero
    assert any(
        "the seeds differ (ntp_debug: 1, 3; nitp_debug: 1, 2, 3)" in w for w in changed_settings([ntp, nitp]).warnings
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
        ("dataloader", "dataset_path", "other.jsonl", "the variants may see other data or another order"),
        ("dataloader", "num_streams", 16, "the variants may see other data or another order"),
        ("training", "global_batch_size", 8, "at the same step the variants have seen different numbers of tokens"),
        (
            "training",
            "steps",
            200,
            "at the same step the variants are at different parts of the learning-rate schedule",
        ),
        ("training", "seq_len", 256, "the variants may see other data or another order"),
        ("model", "flavor", "8B", "more than NITP is compared"),
        ("validator", "steps", 4, "validation is not on the same tokens"),
        ("geometry", "validation_batches", 4, "validation geometry is not of the same tokens"),
        ("checkpoint", "initial_load_path", "there", "the variants may start from different weights"),
    ],
)
def test_an_unfair_comparison_is_called_so(tmp_path, table, key, value, reason):
    write_run(tmp_path / "a", steps=50)
    write_run(tmp_path / "b", steps=50, nitp=three_phases, **{table: {key: value}})
    found = changed_settings(read_variants([str(tmp_path / "a"), str(tmp_path / "b")])[0])
    assert list(found.others) == [f"[{table}] {key}"]
    assert found.warnings == [f"[{table}] {key} differs: {reason}."]


def test_a_fair_comparison_differs_in_nitp_alone(seeds):
    found = changed_settings(variants_of(seeds / "ntp", seeds / "nitp"))
    assert found.nitp == {"[nitp] weight": [0.0, 1.0]} and found.others == {} and found.warnings == []


@pytest.mark.parametrize(
    "table, key, value",
    [
        ("metrics", "log_freq", 5),
        ("validator", "freq", 50),
        ("geometry", "interval", 5),
        # Sequences and losses are those of one rank in every layout.
        ("parallelism", "data_parallel_shard_degree", 8),
        ("parallelism", "pipeline_parallel_degree", 2),
        ("training", "local_batch_size", 2),
        ("dataloader", "num_workers", 2),
        ("model", "attn_backend", "flex"),
    ],
)
def test_harmless_settings_are_named_without_a_warning(tmp_path, table, key, value):
    variants = variants_of(
        write_run(tmp_path / "a"), write_run(tmp_path / "b", nitp=three_phases, **{table: {key: value}})
    )
    found = changed_settings(variants)
    assert list(found.others) == [f"[{table}] {key}"] and found.warnings == []


def test_a_run_that_is_still_going_is_compared_as_far_as_it_is(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", nitp=three_phases, steps=60)
    variants, problems = read_variants([str(tmp_path / "a"), str(tmp_path / "b")])
    assert problems == [f"{tmp_path / 'b'}: at step 60 of 100; it is compared as far as it is."]
    assert common_steps(run.series("tokens") for variant in variants for run in variant.runs) == list(range(1, 61))
    message = "the runs are at steps 60 to 100: values are compared at steps that all of them have."
    assert message in changed_settings(variants).warnings
    report = Report(variants, problems)
    header, rows = report.final_table()
    assert [row[header.index("tokens")] for row in rows] == ["30,720", "30,720", "60"]
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
    variants, problems = read_variants([str(tmp_path / name) for name in ("a", "b", "empty", "missing")])
    assert problems == [
        f"{tmp_path}/empty has no metrics.jsonl; it is not the folder of a training run.",
        f"{tmp_path}/missing does not exist.",
        f"{tmp_path}/b: metrics.jsonl: 2 of 100 lines are not records (5, 10); they are left out.",
        f"{tmp_path}/b: resolved.json is damaged: its settings are unknown.",
    ]
    report = Report(variants, problems)
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
        report = Report(*read_variants([str(tmp_path / name) for name in runs]))
        report.write(tmp_path / "out")
        assert "b: no resolved.json: its settings are unknown." in (tmp_path / "out/report.md").read_text()


def test_nothing_to_compare_is_an_error_with_all_reasons(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").write_text("")
    with pytest.raises(UserError) as error:
        read_variants([str(tmp_path / "empty"), str(tmp_path / "missing")])
    assert str(error.value) == (
        f"there is no run to compare. {tmp_path}/empty/metrics.jsonl holds no step; the run is left out. "
        f"{tmp_path}/missing does not exist."
    )


def test_one_run_per_variant_claims_nothing(tmp_path):
    variants = variants_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", nitp=three_phases, better=0.5))
    first, phase = Report(variants).sentences()
    assert first.startswith(
        "nitp_debug against ntp_debug: validation NTP loss -0.5000 at step 100; validation effective "
    )
    assert first.endswith("With one run per variant all of this may be chance: the data show nothing.")
    assert phase.startswith("NITP loss of nitp_debug (moving average): 0.901 at the first step, collapses to")


def test_three_seeds_say_what_is_shown_and_what_is_not(seeds):
    (first, *_) = Report(variants_of(seeds / "ntp", seeds / "nitp")).sentences()
    assert first == (
        "nitp_debug against ntp_debug, 3 seeds: the data show a difference in validation NTP loss -0.2000 (-0.3000 to "
        "-0.1000) at step 100; validation effective rank +0.2 (+0.1 to +0.3) at step 100, and they show none in "
        "validation cosine +0.000 (+0.000 to +0.000) at step 100."
    )


def test_the_tables_have_mean_range_difference_and_steps(seeds):
    report = Report(variants_of(seeds / "ntp", seeds / "nitp"))
    header, rows = report.final_table()
    cells = [dict(zip(header, row)) for row in rows]
    assert cells[0]["validation NTP loss"] == "5.9000 ± 0.0000" and cells[1]["validation NTP loss"] == "5.7000 ± 0.1000"
    assert cells[2]["variant"] == "at step" and cells[2]["validation NTP loss"] == "100"
    header, rows = report.difference_table()
    cells = ["validation NTP loss", "100", "nitp_debug", "-0.2000", "-0.3000 to -0.1000", "3", "show a difference"]
    assert cells in rows
    assert not any(row[0] in ("tokens", "NITP loss") for row in rows)


def test_a_value_that_rounds_to_nothing_has_no_sign_of_less(seeds):
    variants = variants_of(seeds / "ntp", seeds / "nitp")
    tiny = {"hidden": {"tokens": 512, "effective_rank": 9.0, "cosine": -1e-9}}
    for index, variant in enumerate(variants):
        validated = [{"step": 100, "hidden": tiny["hidden"] | {"cosine": -1e-9 * (index + 1)}}]
        variant.runs[:] = [dataclasses.replace(run, validation_geometry=validated) for run in variant.runs]
    report = Report(variants)
    header, rows = report.final_table()
    assert [row[header.index("validation cosine")] for row in rows] == ["0.000 ± 0.000", "0.000 ± 0.000", "100"]
    cells = next(row for row in report.difference_table()[1] if row[0] == "validation cosine")
    assert cells[3:5] == ["+0.000", "+0.000 to +0.000"]
    assert "validation cosine +0.000 (+0.000 to +0.000)" in report.sentences()[0]


def test_every_plot_is_a_file_and_in_the_page(seeds):
    report = Report(variants_of(seeds / "ntp", seeds / "nitp"))
    report.write(seeds / "out")
    names = [each.name for each in report.drawings]
    assert {"ntp_loss", "validation_ntp_loss", "nitp_loss", "effective_rank", "cosine", "spectra"} < set(names)
    assert {"layers_effective_rank", "learning_rate", "throughput", "validation_effective_rank"} < set(names)
    for name in names:
        assert (seeds / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (seeds / f"out/{name}.svg").read_text()
    page, text = (seeds / "out/index.html").read_text(), (seeds / "out/report.md").read_text()
    assert page.count("<svg ") == page.count("<figcaption>") == len(names)
    assert all(f"({name}.png)" in text for name in names)
    assert (seeds / "out/overview.png").exists()


def test_the_page_asks_for_nothing_and_takes_the_colours_of_the_reader(seeds):
    page = Report(variants_of(seeds / "ntp", seeds / "nitp")).html()
    for request in ("<script", "src=", "@import", "url(http"):
        assert request not in page
    hrefs = {part.split('"')[0] for part in page.split('href="')[1:]}
    assert all(href.startswith(("#", "data:")) for href in hrefs)
    assert "prefers-color-scheme: dark" in page and "currentColor" in page
    assert drawing._INK not in page and drawing._GRID not in page


def _axes_of(drawn):
    with pyplot.rc_context(drawing._PRINTED):
        figure = drawing._figure(drawn)
        figure.canvas.draw()
    return figure, figure.axes[0]


def test_no_unit_is_invented_and_a_cut_axis_says_so(seeds):
    by_name = {each.name: each for each in Report(variants_of(seeds / "ntp", seeds / "nitp")).drawings}
    labels = {name: _axes_of(plot)[1].get_ylabel() for name, plot in by_name.items()}
    assert not any("direction" in label for label in labels.values())
    assert labels["effective_rank"] == "effective rank (log scale)"
    _, axes = _axes_of(by_name["ntp_loss"])
    largest = max(max(line.get_ydata()) for line in axes.lines)
    assert largest > axes.get_ylim()[1]
    assert labels["ntp_loss"] == f"nats per token, above {axes.get_ylim()[1]:.2g} cut off"


def test_legends_and_words_lie_on_no_curve_and_grids_behind_bars(seeds):
    drawings = Report(variants_of(seeds / "ntp", seeds / "nitp")).drawings
    for each in drawings:
        figure, axes = _axes_of(each)
        assert axes.get_legend() is None and len(figure.legends) == 1
        legend, area = figure.legends[0].get_window_extent(), axes.get_window_extent()
        assert not legend.overlaps(area)
        assert axes.get_axisbelow() is True
    _, axes = _axes_of(next(each for each in drawings if each.name == "nitp_loss"))
    words = [text.get_window_extent() for text in axes.texts]
    curves = [axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_label()[0] != "_"]
    assert len(words) == 2 and len(curves) == 1
    assert not any(box.contains(x, y) for box in words for points in curves for x, y in points)


def test_names_cannot_break_the_page(tmp_path):
    write_run(tmp_path / "a")
    page = Report(variants_of(f'<b>&"x={tmp_path / "a"}')).html()
    assert "<b>&" not in page.replace("<b>NTP", "") and "&lt;b&gt;&amp;" in page


def test_spectra_are_drawn_at_the_measured_steps_nearest_to_those_asked_for(seeds):
    variants = variants_of(seeds / "ntp", seeds / "nitp")
    assert plots.chosen_steps(variants) == [100, 25, 1]
    assert plots.chosen_steps(variants, [45, 80]) == [75, 50]


def test_the_compare_script_writes_the_report_and_refuses_what_is_no_run(seeds, project_folder):
    command = [sys.executable, "scripts/compare.py", "--out", str(seeds / "out")]
    done = subprocess.run([*command, str(seeds / "ntp"), str(seeds / "nitp")], capture_output=True, text=True)
    assert done.returncode == 0 and "| ntp_debug | 3 | 51,200 |" in done.stdout, done.stderr
    assert (seeds / "out/index.html").exists()
    failed = warm_python(*command[1:], str(seeds / "nowhere"))
    assert failed.returncode == 1
    assert failed.stderr == f"error: there is no run to compare. {seeds / 'nowhere'} does not exist.\n"
    (seeds / "file").write_text("")
    failed = warm_python(*command[1:3], str(seeds / "file"), str(seeds / "ntp"))
    assert failed.returncode == 1 and failed.stderr.startswith("error: --out ") and failed.stderr.count("\n") == 1


def test_the_records_of_a_training_run_are_what_the_report_reads(tmp_path, assets):
    """Not made-up ones: names of files, states and settings are those of a run."""
    from helpers import make_config, train

    train(make_config(tmp_path / "run", geometry={"enable": True, "interval": 1, "layers": True}))
    (variant,) = read_variants([str(tmp_path / "run")])[0]
    names = {each.name for each in plots.drawings([variant])}
    assert {"ntp_loss", "nitp_loss", "effective_rank", "cosine", "target_effective_rank", "spectra"} < names
    assert {"layers_effective_rank", "learning_rate", "throughput"} < names
    assert variant.runs[0].seed == 42 and not variant.is_ntp
    assert json.loads((tmp_path / "run/resolved.json").read_text())["nitp"]["weight"] == 1.0
