"""The mechanism study: its runs start, stop and resume, and its table says only what its seeds show."""

import json
import os

import pytest
from processes import warm_python
from report_runs import three_phases, write_run
from study.report import MECHANISMS, mechanisms_table, read_study

from nitp_titan.cli.launch import TrainingRun
from nitp_titan.config import recipe
from nitp_titan.errors import UserError


def _rows(table: str) -> dict[str, dict[str, str]]:
    rows = [line for line in table.splitlines() if line.startswith("|")]
    header, _, *lines = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {line[0]: dict(zip(header, line)) for line in lines}


@pytest.fixture
def runs(tmp_path):
    """NITP with NTP losses lower by 0.1 to 0.3; a same-position variant that differs by chance."""
    for seed, chance in ((1, -0.2), (2, 0.2), (3, 0.1)):
        write_run(tmp_path / f"ntp/seed_{seed}", seed=seed)
        write_run(tmp_path / f"nitp/seed_{seed}", seed=seed, nitp=three_phases, better=0.1 * seed)
        write_run(tmp_path / f"same_position/seed_{seed}", seed=seed, nitp=three_phases, better=0.1 * seed + chance)
    return tmp_path


def test_every_variant_of_a_mechanism_is_a_recipe():
    available = recipe.available("recipes")
    names = {name for mechanism in MECHANISMS for name in (mechanism.variant, mechanism.baseline) if name}
    assert {f"study/{name}" for name in names} <= set(available)
    assert {name for name in available if name.startswith("study/")} == {f"study/{name}" for name in names}


def test_the_table_has_a_row_for_every_claim_whose_variants_are_there(runs):
    rows = _rows(mechanisms_table(read_study(runs)))
    assert "MSE makes gradients spike" not in rows
    rank = rows["effective rank is higher"]
    assert rank["value"] == "9.20 (9.10 to 9.30)" and rank["baseline"] == "9.00"
    assert rank["difference (95% interval)"] == "+0.20 (+0.10 to +0.30)" and rank["seeds"] == "3"
    assert rank["seen"] == "yes"
    phases = rows["NITP loss collapses, then rises"]
    assert float(phases["value"].split()[0]) > 3 and phases["baseline"] == "-" and phases["seen"] == "yes"
    assert rows["and then declines"]["seen"] == "yes"


def test_the_verdict_follows_the_interval(runs):
    rows = _rows(mechanisms_table(read_study(runs)))
    # Lower by 0.1 to 0.3, far beyond the hundredth that still counts as the same.
    assert rows["NTP loss is preserved"]["seen"] == "no, lower"
    assert rows["and is the worse objective"]["seen"] == "unclear"
    # Not different by a bit in any seed.
    assert rows["cosine is lower"]["seen"] == "no"


@pytest.mark.parametrize(
    "lower, seen",
    [
        ((0.0, 0.005, -0.005), "yes"),
        ((0.0, 0.005, 0.02), "unclear"),
        ((0.02, 0.03, 0.04), "no, lower"),
        ((-0.02, -0.03, -0.04), "no, higher"),
    ],
)
def test_a_loss_is_preserved_within_a_hundredth(tmp_path, lower, seen):
    for seed, better in enumerate(lower, 1):
        write_run(tmp_path / f"ntp/seed_{seed}", seed=seed)
        write_run(tmp_path / f"nitp/seed_{seed}", seed=seed, nitp=three_phases, better=better)
    assert _rows(mechanisms_table(read_study(tmp_path)))["NTP loss is preserved"]["seen"] == seen


@pytest.mark.parametrize("last, seen", [(12.0, "no"), (11.7, "no"), (9.0, "yes")])
def test_a_rank_falls_if_it_ends_a_twentieth_below_its_peak(tmp_path, last, seen):
    for seed in (1, 2, 3):
        folder = write_run(tmp_path / f"ntp/seed_{seed}", seed=seed)
        records = [
            {"step": step, "hidden": {"effective_rank": rank}} for step, rank in ((100, 50.0), (200, 12.0), (300, last))
        ]
        (folder / "validation_geometry.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    row = _rows(mechanisms_table(read_study(tmp_path)))["effective rank of NTP falls after its peak"]
    assert row["seen"] == seen and row["value"].startswith(f"{last / 12:.2f}")


def test_unfinished_runs_and_too_few_seeds_claim_nothing(runs):
    write_run(runs / "ntp/seed_4", seed=4, steps=50)
    assert len(read_study(runs)["ntp"].runs) == 3
    (runs / "nitp/seed_3/metrics.jsonl").unlink()
    assert _rows(mechanisms_table(read_study(runs)))["effective rank is higher"]["seen"] == "too few seeds"


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no runs of the study yet"):
        read_study(tmp_path)


def _training(folder, *flags: str) -> TrainingRun:
    paths = recipe.find("study/ntp", "recipes"), recipe.find("cpu", "train_configs")
    return TrainingRun(name="ntp", recipe=paths[0], train_config=paths[1], folder=folder, flags=list(flags))


def test_a_finished_run_is_not_trained_again_and_one_with_other_settings_is_kept_aside(tmp_path, assets):
    messages = []
    small = ("--training.steps", "2", "--validator.no-enable", "--checkpoint.no-enable")
    run = _training(tmp_path / "run", *small)
    assert not run.finished()
    run.train(messages.append)
    assert (
        run.finished()
        and any(line.startswith("step 1/2") for line in messages)
        and messages[-1].startswith("trained in")
    )
    messages.clear()
    run.train(messages.append)
    assert messages == [f"already trained ({tmp_path / 'run'})"]
    written = (tmp_path / "run/metrics.jsonl").read_text()
    other = _training(tmp_path / "run", *small, "--debug.seed", "7")
    assert not other.finished()
    other.train(messages.append)
    assert (tmp_path / "run.1/metrics.jsonl").read_text() == written
    assert json.loads((tmp_path / "run/resolved.json").read_text())["debug"]["seed"] == 7


def test_a_run_that_fails_says_why(tmp_path, assets):
    with pytest.raises(UserError, match=r"local_batch_size = 7 times(.|\n)*training of ntp failed"):
        _training(tmp_path / "run", "--training.local_batch_size", "7").train(lambda line: None)


def test_the_script_names_wrong_arguments(project_folder, tmp_path):
    command = ["scripts/study", "--out", str(tmp_path)]
    for arguments, message in (
        (
            ["--recipe", "nitpp"],
            "error: --recipe nitpp: there is no such recipe in recipes/study. Did you mean 'nitp'?\n",
        ),
        (["--parallel", "0"], f"error: --parallel 0: 1 to {len(os.sched_getaffinity(0))}, the number of cores.\n"),
        (["--report"], f"error: {tmp_path} holds no runs of the study yet.\n"),
    ):
        done = warm_python(*command, *arguments)
        assert (done.returncode, done.stderr) == (1, message)
