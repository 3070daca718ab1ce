"""The two entry points under torchrun, the command line and the quickstart."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from processes import warm_python

from nitp_titan.config.recipe import PROJECT
from nitp_titan.errors import UserError
from nitp_titan.objectives.settings import NITPConfig
from nitp_titan.step_files import read_records
from nitp_titan.train import check_groups, titan_arguments

FLAGS = ["--training.steps", "2", "--metrics.log_freq", "1", "--checkpoint.no-enable", "--nitp.weight", "0.8"]
# Otherwise TorchTitan warns of a warm-up that is longer than training.
FLAGS += ["--lr_scheduler.warmup_steps", "2"]
# Values of variables, which must not be seen again anywhere.
SECRETS = {
    "HF_TOKEN": "hf_sentinelsentinelsentinelsentinel",
    "HUGGING_FACE_HUB_TOKEN": "hf_secondsentinelsecondsentinel",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}
TRACKERS = [
    "--metrics.enable_tensorboard",
    "--metrics.enable_wandb",
    "--geometry.interval",
    "1",
    "--debug.print_config",
]
LR = ["--optimizer.lr", "1e-4"], ["--optimizer.param-groups.0.optimizer-kwargs.lr", "1e-4"]


@pytest.fixture(scope="module")
def both(torchrun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("entries")
    ours = torchrun(
        1,
        "-m",
        "nitp_titan.train",
        "--recipe",
        "recipes/debug/nitp_debug.toml",
        "--train-config",
        "train_configs/cpu.toml",
        "--dump_folder",
        str(folder / "ours"),
        *FLAGS,
        *TRACKERS,
        *LR[0],
        WANDB_MODE="offline",
        **SECRETS,
    )
    stock = torchrun(
        1,
        "-m",
        "torchtitan.train",
        "--module",
        "nitp_titan",
        "--config",
        "debug/nitp_debug@cpu",
        "--dump_folder",
        str(folder / "stock"),
        *FLAGS,
        *LR[1],
    )
    for done in (ours, stock):
        assert done.returncode == 0, done.stderr[-4000:]
    (folder / "said.txt").write_text(ours.stdout + ours.stderr)
    return folder


def test_no_token_of_the_environment_is_written_or_said(both):
    written = {path: path.read_bytes() for path in [both / "said.txt", *(both / "ours").rglob("*")] if path.is_file()}
    assert any("wandb" in str(path) for path in written) and any("tfevents" in path.name for path in written)
    assert (both / "ours/starts.jsonl") in written and (both / "ours/geometry.jsonl") in written
    for name, value in SECRETS.items():
        for path, content in written.items():
            assert value.encode() not in content, f"{name} in {path}"


def test_both_entry_points_give_identical_losses(both):
    ours, stock = (read_records(both / name / "metrics.jsonl") for name in ("ours", "stock"))
    assert [record["step"] for record in ours] == [1, 2]
    for key in ("ntp_loss", "nitp_loss", "loss", "grad_norm", "lr", "tokens"):
        assert [record[key] for record in ours] == [record[key] for record in stock], key


def test_a_run_on_one_cpu_warns_of_nothing(both):
    warned = [line for line in (both / "said.txt").read_text().splitlines() if re.search("WARNING|Warning|^W1", line)]
    assert warned == []


def test_flags_reach_the_run_and_its_resolved_recipe(both):
    resolved = json.loads((both / "ours/resolved.json").read_text())
    assert resolved["nitp"]["weight"] == 0.8 and resolved["training"]["steps"] == 2
    for record in read_records(both / "ours/metrics.jsonl"):
        assert record["lr"] == pytest.approx(1e-4 * record["step"] / 2)
        assert record["loss"] == pytest.approx(record["ntp_loss"] + 0.8 * record["nitp_loss"], rel=1e-5)


def test_the_optimizer_flags_have_the_names_of_the_recipe():
    arguments = titan_arguments(
        ["--recipe", "a", "--train_config", "b", "--optimizer.lr", "1e-4", "--optimizer.weight_decay=0"]
    )
    flag = "--optimizer.param-groups.0.optimizer-kwargs."
    assert arguments == ["--module", "nitp_titan", "--config", "a@b", f"{flag}lr", "1e-4", f"{flag}weight_decay=0"]
    hyphen = titan_arguments(["--recipe", "a", "--optimizer.weight-decay", "0.2", "--optimizer.implementation=fused"])
    assert hyphen[4:] == [f"{flag}weight_decay", "0.2", "--optimizer.implementation=fused"]


def test_an_optimizer_flag_is_refused_where_several_groups_have_the_setting(tmp_path):
    recipe = (PROJECT / "recipes/debug/ntp_debug.toml").read_text()
    head, _, rest = recipe.partition("[optimizer]\n")
    group = 'optimizer_name = "AdamW", optimizer_kwargs = { lr = 1e-3 }'
    groups = "".join(f'{{ pattern = "{pattern}", {group} }},' for pattern in ("norm", ".*"))
    path, _, others = tmp_path / "two.toml", *rest.partition("\n[")[1:]
    path.write_text(f"{head}[optimizer]\nparam_groups = [{groups}]\n[{others}")
    with pytest.raises(UserError) as refused:
        check_groups(["--nitp.weight", "1", "--optimizer.lr=1"], f"{path}@cpu")
    assert str(refused.value) == (
        "--optimizer.lr: the recipe's optimizer has 2 groups of parameters with settings of their own; name the group: "
        "--optimizer.param-groups.0.optimizer-kwargs.lr to --optimizer.param-groups.1.optimizer-kwargs.lr."
    )
    check_groups(["--nitp.weight", "1"], f"{path}@cpu")
    check_groups(["--optimizer.lr=1"], "debug/ntp_debug@cpu")


def _start(*arguments):
    command = [sys.executable, "-m", "nitp_titan.train", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def outside_torchrun(monkeypatch):
    monkeypatch.delenv("RANK")


def test_the_first_screen_of_help_is_enough_to_start_and_names_the_rest(outside_torchrun):
    done = _start("--help")
    assert done.returncode == 0 and done.stderr == ""
    shown = done.stdout
    assert shown.startswith("usage: torchrun --nproc_per_node N -m nitp_titan.train --recipe R")
    assert len(shown.splitlines()) < 50 and max(map(len, shown.splitlines())) <= 120
    for field in dataclasses.fields(NITPConfig):
        assert f"--nitp.{field.name} " in shown or f"--nitp.no-{field.name} " in shown, field.name
    for text in ("--training.steps", "--resume", "--overwrite", "--help-all", "Weight lambda of the NITP loss"):
        assert text in shown, text
    assert shown.index("--nitp.weight") < shown.index("--training.steps")


def test_all_flags_are_listed_on_demand(outside_torchrun):
    done = warm_python("-m", "nitp_titan.train", "--help-all")
    assert done.returncode == 0
    for text in ("--nitp.target-layer", "--nitp.stop-gradient", "--float8.enable", "Weight lambda of the NITP loss"):
        assert text in done.stdout, text


def test_without_torchrun_it_says_how_to_start(outside_torchrun):
    done = _start("--recipe", "recipes/debug/nitp_debug.toml")
    assert done.returncode == 1
    assert done.stderr == (
        "error: training starts under torchrun: torchrun --nproc_per_node 1 -m nitp_titan.train "
        "--recipe recipes/debug/nitp_debug.toml\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --recipe is missing; `python scripts/recipe.py list` shows the project's own."),
        (["--recipe", "recipes/debug/nitp_debgu.toml"], "nitp_debgu.toml does not exist. Did you mean"),
        (
            ["--recipe", "debug/nitp_debug", "--nitp.target_layer", "9"],
            "[nitp] target_layer = 9, but it must be 0 (embedding) to 4",
        ),
        (
            ["--recipe", "debug/nitp_debug", "--training.local_batch_size", "3"],
            "error: [training] local_batch_size = 3 times 1 data-parallel ranks does not divide",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_said_without_a_traceback(tmp_path, arguments, message):
    arguments = [*arguments, "--train-config", "cpu", "--dump_folder", str(tmp_path / "run")]
    done = warm_python("-m", "nitp_titan.train", *arguments)
    assert done.returncode != 0
    # tyro draws a box around what flags get wrong.
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_mistake_met_while_building_is_said_by_the_stock_entry_point_without_a_traceback(assets, tmp_path):
    arguments = ["--module", "nitp_titan", "--config", "debug/nitp_debug@cpu", "--dump_folder", str(tmp_path / "run")]
    done = warm_python("-m", "torchtitan.train", *arguments, "--resume", "--overwrite")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.endswith("\nerror: --resume resumes a run and --overwrite starts it anew; give one of them.\n")


def test_of_many_ranks_one_says_what_is_wrong(torchrun):
    done = torchrun(2, "-m", "nitp_titan.train", "--recipe", "debug/nitp_debug", "--train-config", "moon")
    # torchrun's summary repeats it.
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert len(lines) == 1 and "moon.toml does not exist" in lines[0]


def test_the_quickstart_deletes_no_folder_that_it_did_not_make(assets, tmp_path):
    (tmp_path / "ntp").mkdir()
    (tmp_path / "ntp/mine.txt").write_text("mine")
    command = [sys.executable, "scripts/quickstart.py", "--steps", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/ntp is not the folder of this run; choose another one with --out.\n"
    assert (tmp_path / "ntp/mine.txt").read_text() == "mine"
