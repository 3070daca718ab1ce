"""A run folder holds one run: the same run resumes, another one is refused, nothing is lost."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import make_config

from nitp_titan.config import build, recipe
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.mixtures import TextSource
from nitp_titan.errors import UserError
from nitp_titan.runs import provenance, run_folder
from nitp_titan.runs.data_facts import data_facts
from nitp_titan.runs.run_folder import plan_resume, read_starts, ResumePlan

CHECKPOINT = {"checkpoint": {"enable": True}}


@pytest.fixture
def config(assets, tmp_path):
    """The settings of a run in ``run``, with changes by section."""

    def make(*, folder="run", **sections):
        training = {"steps": 100, **sections.pop("training", {})}
        return make_config(tmp_path / folder, **{**CHECKPOINT, **sections}, training=training)

    return make


@pytest.fixture
def run(config, tmp_path):
    """A folder as a run of `config` leaves it, with checkpoints up to step 20; the last one is half-written."""
    folder = tmp_path / "run"
    run_folder.write_resolved(config(), folder)
    (folder / "data.json").write_text(json.dumps([{"first_step": 0, "facts": data_facts(config())}]))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    for step in (3, 20, 100):
        (folder / f"checkpoint/step-{step}").mkdir(parents=True)
        if step != 100:
            (folder / f"checkpoint/step-{step}/.metadata").touch()
    return folder


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_without_a_run_may_hold_anything(config, tmp_path):
    assert plan_resume(config()).from_step is None and not (tmp_path / "run").exists()
    (tmp_path / "run/structured_logs").mkdir(parents=True)
    (tmp_path / "run/log.txt").write_text("of the launcher")
    start = plan_resume(config(overwrite=True))
    assert (start.from_step, start.archived) == (None, [])
    assert plan_resume(config(resume=True)).message == "--resume: there is no run yet, a new one starts"


def test_the_same_run_resumes_with_another_layout_and_other_intervals(config, run):
    before = _files(run)
    start = plan_resume(
        config(
            training={"local_batch_size": 2},
            parallelism={"data_parallel_shard_degree": 2},
            checkpoint={"enable": True, "interval": 7},
            geometry={"enable": True},
            metrics={"log_freq": 5},
        )
    )
    assert (start.from_step, start.archived) == (20, [])
    assert start.message == f"{run}: the run resumes from step 20"
    assert _files(run) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"training": {"steps": 200}}, "[training] steps: 100 -> 200. "),
        ({"nitp": {"weight": 0.5}}, "[nitp] weight: 1.0 -> 0.5. "),
        ({"debug": {"seed": 7}}, "[debug] seed: 42 -> 7. "),
        ({"documents": "whole"}, "[dataloader] documents: 'packed' -> 'whole'. "),
        ({"training": {"steps": 9, "seq_len": 64, "max_norm": 1.0, "global_batch_size": 8}}, "; and 1 more. "),
    ],
)
def test_another_recipe_or_other_data_are_refused_with_what_differs(config, run, changed, said):
    before = _files(run)
    with pytest.raises(UserError) as refused:
        plan_resume(config(**changed))
    text = str(refused.value)
    assert text.startswith(f"{run} holds another run: ") and said in text and "\n" not in text
    assert text.endswith(
        "Choose another --dump_folder, or set the old run aside with --overwrite, or resume the run all the same "
        "with --resume."
    )
    assert _files(run) == before


def test_a_learning_rate_is_named_as_the_recipe_names_it(config, run):
    other = config()
    group = other.optimizer.param_groups[0]
    faster = dataclasses.replace(group, optimizer_kwargs={**group.optimizer_kwargs, "lr": 0.5})
    optimizer = dataclasses.replace(other.optimizer, param_groups=[faster])
    with pytest.raises(UserError, match=r"holds another run: \[optimizer\] lr: [0-9.e-]+ -> 0\.5\."):
        plan_resume(dataclasses.replace(other, optimizer=optimizer))


def test_resume_resumes_with_changed_settings_from_a_checkpoint_only(config, run):
    start = plan_resume(config(training={"steps": 200}, resume=True))
    assert start.from_step == 20
    assert start.message == f"{run}: the run resumes from step 20 with [training] steps: 100 -> 200"
    (run / "checkpoint").rename(run / "elsewhere")
    with pytest.raises(UserError, match="steps: 100 -> 200; there is no checkpoint to resume from. Choose another"):
        plan_resume(config(training={"steps": 200}, resume=True))
    assert plan_resume(config()).message == f"{run}: the run had no checkpoint yet and starts again"


def test_both_flags_at_once_and_a_file_as_folder_are_refused(config, tmp_path):
    with pytest.raises(UserError, match="give one of them"):
        plan_resume(config(resume=True, overwrite=True))
    with pytest.raises(UserError, match="--overwrite starts without the step that --checkpoint.load_step names"):
        plan_resume(config(checkpoint={"enable": True, "load_step": 20}, overwrite=True))
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="dump_folder = '.*/run' is a file"):
        plan_resume(config())


def test_overwrite_keeps_the_old_run_beside_the_new_one(config, run, tmp_path):
    for name in ("structured_logs", "comm_traces"):
        (run / name).mkdir()
        (run / name / "of_the_old_run").touch()
    before = _files(run)
    (tmp_path / "run.1").mkdir()
    start = plan_resume(config(training={"steps": 200}, overwrite=True))
    assert (start.from_step, start.archived) == (None, [run]) and run.exists()
    start.claim()
    assert _files(tmp_path / "run.2") == before
    assert [path.name for path in run.rglob("*")] == ["comm_traces"]
    assert plan_resume(config(training={"steps": 200})).from_step is None


def test_overwrite_sets_aside_checkpoints_that_lie_elsewhere(config, run, tmp_path):
    (run / "checkpoint").rename(tmp_path / "elsewhere")
    checkpoint = {"enable": True, "folder": str(tmp_path / "elsewhere")}
    assert plan_resume(config(checkpoint=checkpoint)).from_step == 20
    plan_resume(config(checkpoint=checkpoint, overwrite=True)).claim()
    assert (tmp_path / "elsewhere.1/step-20/.metadata").exists() and (tmp_path / "run.1/resolved.toml").exists()
    assert not (tmp_path / "elsewhere").exists()
    remote = config(checkpoint={"enable": True, "folder": "s3://bucket/run"}, overwrite=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    with pytest.raises(UserError, match="cannot set checkpoints in a remote folder aside"):
        plan_resume(remote)
    start = plan_resume(dataclasses.replace(remote, overwrite=False, resume=True))
    assert start.message == f"{tmp_path}/run: the run resumes from s3://bucket/run"


def test_a_restart_of_the_same_job_does_not_overwrite_what_it_began(config, run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    # The job died before it set the old run aside.
    assert plan_resume(config(overwrite=True)).archived == [run]
    plan_resume(config()).write_start(config(), world_size=1)
    assert plan_resume(config(overwrite=True)).from_step == 20
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert plan_resume(config(overwrite=True)).archived == [run]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert plan_resume(config(overwrite=True)).from_step == 20
    # The files of the recipe were changed meanwhile.
    assert plan_resume(config(overwrite=True, debug={"seed": 7})).archived == [run]
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert plan_resume(config(overwrite=True)).archived == [run]


@pytest.mark.parametrize("damage", ["", "resolved = true\n[training", None])
def test_a_run_of_an_unknown_recipe_is_refused(config, run, damage):
    resolved = run / "resolved.toml"
    resolved.unlink() if damage is None else resolved.write_text(damage)
    with pytest.raises(UserError, match="holds a run without a readable resolved.toml, so that it may be of another"):
        plan_resume(config())
    assert plan_resume(config(resume=True)).from_step == 20
    assert plan_resume(config(overwrite=True)).archived == [run]


def test_a_run_of_an_older_version_had_the_defaults_of_later_settings(config, run):
    resolved = run / "resolved.toml"
    text = resolved.read_text()
    older = "".join(line for line in text.splitlines(True) if not line.startswith(("start_step", "projector_width")))
    assert len(older) < len(text)
    resolved.write_text(older)
    assert plan_resume(config()).from_step == 20
    with pytest.raises(UserError, match=r"\[nitp\] start_step: 0 -> 5\."):
        plan_resume(config(nitp={"start_step": 5}))


def test_a_run_whose_tables_had_other_names_is_refused_or_set_aside(config, run):
    with (run / "resolved.toml").open("a") as file:
        file.write("[guard]\nmode = 'skip'\n")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"another version of nitp-titan: .* has a table \[guard\] \(CHANGELOG.md"):
            plan_resume(config(resume=resume))
    assert plan_resume(config(overwrite=True)).archived == [run]


def test_a_run_with_checkpoints_does_not_start_again_without_them(config, run):
    with pytest.raises(UserError, match=r"checkpoints up to step 20, and \[checkpoint\] enable = false would not load"):
        plan_resume(config(checkpoint={"enable": False}))


def test_every_setting_of_the_data_but_how_they_are_read_identifies_a_run(config):
    keys = {field.name for field in dataclasses.fields(TextDataLoader.Config) if not field.name.startswith("_")}
    tables = build.tables_of(dataclasses.replace(config(), dataloader=TextDataLoader.Config()))
    kept = run_folder.identity(tables)["dataloader"]
    reading = {"num_workers", "persistent_workers", "pin_memory", "prefetch_factor"}
    # Known by content and effect: tests/runs/test_data_facts.py.
    assert keys - set(kept) == reading | {"dataset_path", "streaming"}


def test_each_start_is_one_line_and_no_setting_is_lost(config, run):
    (run / "resolved.toml").unlink()
    settings = [config(), config(training={"steps": 200, "local_batch_size": 2}), config(training={"steps": 300})]
    for each in settings:
        plan_resume(dataclasses.replace(each, resume=True)).write_start(each, hosts=["here"], world_size=1)
        with (run / "starts.jsonl").open("a") as stream:
            # As if the start after it had been cut short.
            stream.write('{"time": ')
    first, second, third = read_starts(run)
    assert first["changed"] == {}
    assert second["changed"] == {"[training] local_batch_size": [4, 2], "[training] steps": [100, 200]}
    assert third["changed"] == {"[training] local_batch_size": [2, 4], "[training] steps": [200, 300]}
    assert first["recipe"] == run_folder.recipe_hash(build.tables_of(settings[0])) != second["recipe"]
    assert third["code"] == provenance.code_hash() and third["from_step"] == 20 and third["hosts"] == ["here"]
    assert third["command"][0].endswith("python") or "pytest" in " ".join(third["command"])
    assert third["versions"]["torchtitan"] == "0.3.0" and third["versions"]["nitp-titan"]
    assert third["time"].endswith("+00:00")
    resolved = json.loads((run / "resolved.json").read_text())
    assert resolved["training"]["steps"] == 300
    assert not {"resume", "overwrite"} & {*resolved, *(run / "resolved.toml").read_text().split()}


def test_a_folder_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/starts.jsonl").mkdir()
    with pytest.raises(UserError, match="starts.jsonl cannot be written: Is a directory"):
        plan_resume(config()).write_start(config())


def test_git_gives_commit_and_dirty_files_and_its_absence_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "PROJECT", tmp_path)
    git = provenance.git.__wrapped__
    assert git() is None
    (tmp_path / "nitp_titan/config").mkdir(parents=True)
    (tmp_path / "nitp_titan/config/recipe.py").touch()
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        provenance._git(*arguments)
    assert git()["dirty"] == [] and len(git()["commit"]) == 40
    (tmp_path / "nitp_titan/config/recipe.py").write_text("x = 1")
    (tmp_path / "new.txt").touch()
    assert git()["dirty"] == ["nitp_titan/config/recipe.py", "new.txt"]
    # An installed copy in the repository of something else.
    monkeypatch.setattr(recipe, "PROJECT", tmp_path / "nitp_titan")
    assert git() is None
    monkeypatch.setattr(recipe, "PROJECT", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert git() is None


def test_the_code_hash_is_that_of_all_files_of_the_package(monkeypatch, tmp_path):
    copy = tmp_path / "nitp_titan"
    (copy / "models").mkdir(parents=True)
    (copy / "models/a.py").write_text("x = 1\n")
    (copy / "provenance.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(copy / "runs/provenance.py"))
    digest = hashlib.sha256(b"models/a.py\x006\x00x = 1\nprovenance.py\x000\x00").hexdigest()
    assert provenance.code_hash.__wrapped__() == digest
    assert provenance.code_hash() != digest and os.environ["RANK"] == "0"


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path):
    code = "import sys; from pathlib import Path; from nitp_titan.runs.run_folder import ResumePlan; import time\n"
    # A start looks at its folder twice.
    code += "ResumePlan(Path(sys.argv[1])).claim(); ResumePlan(Path(sys.argv[1])).claim(); print('held', flush=True)\n"
    code += "time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        message = rf"{tmp_path} is in use: process {other.pid} on .* trains there"
        with pytest.raises(UserError, match=message):
            ResumePlan(tmp_path).claim()
        with pytest.raises(UserError, match=message):
            ResumePlan(tmp_path, archived=[tmp_path]).claim()
        other.kill()
    assert tmp_path.is_dir()
    ResumePlan(tmp_path).claim()


def _steps(folder):
    return sorted(path.name for path in folder.glob("step-*"))


def test_an_earlier_step_is_resumed_from_and_later_ones_are_set_aside(config, run, caplog):
    for name, lines in {"metrics": [1, 3, 10, 20], "validation_geometry": [3, 20], "skipped": [2]}.items():
        (run / f"{name}.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in lines))
    before = _files(run)
    other_way = config(checkpoint={"enable": True, "load_step": 3})
    start = plan_resume(other_way)
    assert (start.from_step, [path.name for path in start.later]) == (3, ["step-20"]) and _files(run) == before
    start.claim()
    place = run / "checkpoint/set_aside/after_step_3"
    assert f"step 20 and later metrics are now in {place}" in caplog.text
    assert _steps(place) == ["step-20"] and (place / "step-20/.metadata").exists()
    assert [json.loads(line)["step"] for line in (place / "metrics.jsonl").read_text().splitlines()] == [10, 20]
    assert (place / "validation_geometry.jsonl").exists() and not (place / "skipped.jsonl").exists()
    # The next start resumes from what was trained since; only one that names the step sets that aside too.
    (run / "checkpoint/step-7").mkdir()
    (run / "checkpoint/step-7/.metadata").touch()
    assert plan_resume(config()).from_step == 7 and plan_resume(config()).later == []
    plan_resume(other_way).claim()
    assert _steps(run / "checkpoint/set_aside/after_step_3.1") == ["step-7"]
    assert plan_resume(config()).from_step == 3


def test_a_kill_while_later_steps_are_set_aside_loses_nothing(config, run, monkeypatch):
    for step in (30, 40):
        shutil.copytree(run / "checkpoint/step-20", run / f"checkpoint/step-{step}")
    other_way, rename, moved = config(checkpoint={"enable": True, "load_step": 3}), type(run).rename, []
    (facts,) = json.loads((run / "data.json").read_text())
    of_both_ways = [facts, {"first_step": 4, "facts": facts["facts"]}]
    (run / "data.json").write_text(json.dumps(of_both_ways))

    def killed(path, target):
        if len(moved) == 1:
            raise KeyboardInterrupt
        moved.append(rename(path, target))

    monkeypatch.setattr(type(run), "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        plan_resume(other_way).claim()
    monkeypatch.undo()
    assert plan_resume(config()).from_step == 40
    assert json.loads((run / "data.json").read_text()) == of_both_ways
    plan_resume(other_way).claim()
    assert json.loads((run / "data.json").read_text()) == [facts]
    aside = run / "checkpoint/set_aside"
    assert json.loads((aside / "after_step_3.1/data.json").read_text()) == of_both_ways
    assert _steps(aside / "after_step_3") + _steps(aside / "after_step_3.1") == ["step-20", "step-30", "step-40"]
    assert plan_resume(config()).from_step == 3


def test_a_restarted_job_resumes_with_the_way_that_it_has_taken(config, run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    other_way = config(checkpoint={"enable": True, "load_step": 3})
    start = plan_resume(other_way)
    start.claim()
    start.write_start(other_way)
    (run / "checkpoint/step-9").mkdir()
    (run / "checkpoint/step-9/.metadata").touch()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = plan_resume(other_way)
    assert (again.from_step, again.later) == (9, [])
    # And at each further restart.
    again.write_start(other_way)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert (plan_resume(other_way).from_step, plan_resume(other_way).later) == (9, [])
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert plan_resume(other_way).from_step == 3


def _without_checkpoints(run):
    shutil.rmtree(run / "checkpoint")


@pytest.mark.parametrize("evidence", ["metrics", "a start", "a checkpoint was noted"])
def test_a_run_whose_checkpoints_are_gone_is_refused(config, run, evidence):
    _without_checkpoints(run)
    if evidence == "metrics":
        (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 90}\n')
        run_folder.write_resolved(config(checkpoint={"enable": True, "interval": 50}), run)
    elif evidence == "a start":
        (run / "starts.jsonl").write_text('{"from_step": 20}\n')
    else:
        plan_resume(config()).note_checkpoint(20)
    before = _files(run)
    message = f"{run} holds a run that has logged step .* and had checkpoints, and {run}/checkpoint holds none. Bring"
    for resume in (False, True):
        with pytest.raises(UserError, match=message):
            plan_resume(config(resume=resume))
    assert _files(run) == before and plan_resume(config(overwrite=True)).archived == [run]


def test_a_finished_run_without_checkpoints_does_not_start_again(config, run):
    _without_checkpoints(run)
    plain = {"checkpoint": {"enable": False}}
    run_folder.write_resolved(config(**plain), run)
    (run / "metrics.jsonl").write_text('{"step": 99}\n')
    assert plan_resume(config(**plain)).message.endswith("the run had no checkpoint yet and starts again")
    (run / "metrics.jsonl").write_text('{"step": 100}\n')
    with pytest.raises(UserError, match="holds a finished run of 100 steps without checkpoints, .* with --overwrite"):
        plan_resume(config(**plain))
    assert plan_resume(config(**plain, overwrite=True)).archived == [run]


def test_fewer_steps_than_done_are_refused_and_a_finished_run_says_so(config, run):
    before = _files(run)
    message = r"the run has done 20 steps, and \[training\] steps = 10\. Take more steps, or an earlier"
    with pytest.raises(UserError, match=message):
        plan_resume(config(training={"steps": 10}, resume=True))
    assert _files(run) == before
    run_folder.write_resolved(config(training={"steps": 20}), run)
    start = plan_resume(config(training={"steps": 20}))
    assert start.message == f"{run}: the run has done its 20 steps, nothing is left to train"


@pytest.mark.parametrize("place", [".", "..", "~", "/", "project", "assets"])
def test_overwrite_renames_no_folder_that_more_lies_in(config, run, place, monkeypatch, assets):
    monkeypatch.chdir(run)
    places = {"~": os.path.expanduser("~"), "project": str(recipe.PROJECT), "assets": str(assets)}
    settings = dataclasses.replace(config(overwrite=True), dump_folder=places.get(place, place))
    settings = dataclasses.replace(settings, hf_assets_path=str(assets))
    before = _files(run)
    with pytest.raises(UserError, match="--overwrite would rename .*, in which .* lies. Choose another --dump_folder"):
        plan_resume(settings)
    assert _files(run) == before


@pytest.mark.parametrize("table", ["dataloader", "validator.dataloader"])
def test_overwrite_does_not_rename_the_data_that_it_reads(config, run, assets, table):
    shutil.copytree(assets, run / "data")
    places = (run / "data/train.jsonl", assets / "train.jsonl")
    mixture = TextDataLoader.Config(sources=[TextSource(dataset_path=str(path)) for path in places])
    settings = config(overwrite=True, validator={"enable": True, "dataloader": config().dataloader})
    if table == "dataloader":
        settings = dataclasses.replace(settings, dataloader=mixture)
    else:
        settings = dataclasses.replace(settings, validator=dataclasses.replace(settings.validator, dataloader=mixture))
    with pytest.raises(UserError) as refused:
        plan_resume(settings)
    assert f"would rename {run}, in which [{table}] dataset_path ({places[0]}) lies" in str(refused.value)


def test_overwrite_does_not_rename_the_checkpoint_that_it_starts_from(config, run):
    checkpoint = {"enable": True, "initial_load_path": str(run / "checkpoint/step-20")}
    with pytest.raises(UserError, match=r"in which \[checkpoint\] initial_load_path .* lies"):
        plan_resume(config(checkpoint=checkpoint, overwrite=True))


@pytest.mark.parametrize("name", ["metrics", "validation", "geometry", "validation_geometry", "skipped", "starts"])
@pytest.mark.parametrize("damage", [b"no json\n", b"\n", b'{"loss": 1}\n', b"[1]\n", b"\xff\xfe\n", "folder"])
def test_a_damaged_file_of_lines_is_set_aside_and_named(config, run, name, damage, caplog):
    path, good = run / f"{name}.jsonl", b'{"step": 1, "x": NaN}\n'
    if damage == "folder":
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        path.write_bytes(good + damage + good + b'{"step": 2, "cut')
    plan_resume(config()).claim()
    if name == "starts" and damage == b'{"loss": 1}\n':
        # A line of a start has no step.
        assert "was damaged" not in caplog.text
        return
    assert f"{path} was damaged; the damaged part is now {path}.damaged" in caplog.text
    if damage == "folder":
        assert not path.exists() and (run / f"{name}.jsonl.damaged").is_dir()
    else:
        assert path.read_bytes() == 2 * good and (run / f"{name}.jsonl.damaged").read_bytes() == damage
        path.write_bytes(damage)
        plan_resume(config()).claim()
        assert (run / f"{name}.jsonl.damaged.1").read_bytes() == damage


def test_a_run_in_weights_and_biases_is_the_same_at_every_start_but_not_on_another_way(config, run, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = plan_resume(config())
    first.write_start(config())
    assert first.wandb_id and plan_resume(config()).wandb_id == first.wandb_id
    assert plan_resume(config(checkpoint={"enable": True, "load_step": 3})).wandb_id != first.wandb_id
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert plan_resume(config()).wandb_id == "mine"
