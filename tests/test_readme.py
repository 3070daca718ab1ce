"""The Markdown files: their commands run, their links lead somewhere, their numbers are those of the project."""

import gzip
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import tomli
from processes import free_port, PROJECT, warm_python
from readme import blocks, Command, commands, DOCUMENTS, every_command, run_elsewhere

from nitp_titan.config import recipe
from nitp_titan.errors import UserError
from nitp_titan.step_files import read_records
from nitp_titan.training.trainer import load_config

WITH_COMMANDS = sorted({command.document for command in every_command()})
# Settings that make a command of hours one of seconds.
_FEW = ["--validator.no-enable", "--geometry.no-enable"]
SMALL = {
    "scripts/quickstart.py": ["--steps", "3"],
    "scripts/geometry.py": ["--tokens", "2000"],
    "scripts/overhead": ["--only", "measured", "--recipe", "debug/nitp_debug", "--rounds", "3", "--warmup", "1"],
    "tests/distributed/table.py": ["--check"],
    "nitp_titan.train": ["--training.steps", "4", *_FEW],
    "torchtitan.train": ["--training.steps", "1", *_FEW],
    "pytest": ["--collect-only", "-p", "no:cacheprovider"],
}


def _name(path):
    return str(path.relative_to(PROJECT))


@pytest.fixture(scope="module")
def project(assets, tmp_path_factory):
    """The project as a newcomer has it after the installation, with outputs of its own."""
    folder = tmp_path_factory.mktemp("project")
    for path in PROJECT.iterdir():
        if path.name in {"nitp_titan", "recipes", "scripts", "tests", "train_configs", "README.md", "pyproject.toml"}:
            (folder / path.name).symlink_to(path)
    (folder / "assets").mkdir()
    # The second in place of one from the network.
    for name in ("stdlib", "qwen2"):
        (folder / "assets" / name).symlink_to(assets)
    (folder / "my_data").mkdir()
    with gzip.open(folder / "my_data/a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"question": f"{n} + {n}?", "answer": f"{2 * n}."}) + "\n" for n in range(200))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=folder, check=True)
    # Installed already; says what Python is asked to do.
    sums = subprocess.run(["cksum"], stdin=(PROJECT / "pyproject.toml").open(), capture_output=True, text=True).stdout
    (folder / ".venv/.installed-for").write_text("".join(f"{sums.strip()} {name}\n" for name in (".", ".[test]")))
    (folder / ".venv/bin/python").unlink()
    (folder / ".venv/bin/python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / ".venv/bin/python").chmod(0o755)
    return folder


def arguments_of_python(words: list[str], project) -> list[str]:
    """What a documented command lets Python do."""
    if words[0] == "torchrun":
        assert words[1:3] == ["--nproc_per_node", "1"], "several ranks are those of tests/distributed"
        return words[3:]
    if words[0].endswith(".sh"):
        done = subprocess.run(["bash", *words], cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()
    assert words[0] == "python", f"no test knows how to run {words[0]}: it runs, or its comment says what it needs"
    return words[1:]


def made_small(arguments: list[str]) -> list[str]:
    program = arguments[1] if arguments[0] == "-m" else arguments[0]
    small = SMALL.get(program, [])
    given = [index for index, word in enumerate(arguments) if word.startswith("--") and word in small]
    kept = [word for index, word in enumerate(arguments) if not {index, index - 1} & set(given)]
    # Of the whole suite a file will do.
    whole = program == "pytest" and not any(word.startswith("tests/") for word in arguments)
    return [*kept, *small, *(["tests/test_errors.py"] if whole else [])]


@pytest.fixture(scope="module")
def run(project):
    """Run a documented command with small settings, once."""
    done: dict[tuple, subprocess.CompletedProcess] = {}

    def once(command: Command) -> subprocess.CompletedProcess:
        words = list(command.words)
        variables = {"MASTER_PORT": str(free_port())}
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words[0] == "source":
            code = f"{command} && [[ $(command -v python) == $PWD/.venv/bin/python ]]"
            return subprocess.run(["bash", "-c", code], cwd=project, capture_output=True, text=True)
        arguments = tuple(made_small(arguments_of_python(words, project)))
        if arguments not in done:
            done[arguments] = warm_python(*arguments, env=os.environ | variables, cwd=project)
        return done[arguments]

    return once


@pytest.fixture(scope="module")
def quickstart(project, run):
    (first, *_) = commands("README.md")
    assert first.words == ("./scripts/quickstart.sh",)
    return run(first)


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_the_commands_of_a_document_run(quickstart, run, document):
    assert quickstart.returncode == 0, quickstart.stdout[-3000:] + quickstart.stderr[-3000:]
    elsewhere = tuple(run_elsewhere())
    for command in commands(document):
        if command.needs is None and not str(command).startswith(elsewhere):
            done = run(command)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


def test_the_quickstart_writes_both_runs_and_the_report_and_a_second_time_is_fast(quickstart, project):
    out = project / "outputs/quickstart"
    for variant in ("ntp", "nitp"):
        assert read_records(out / variant / "metrics.jsonl")[-1]["tokens"] > 0
        assert (out / variant / "resolved.toml").exists() and (out / variant / "checkpoint/step-3/.metadata").exists()
    assert (out / "report/index.html").exists() and (out / "report/overview.png").exists()
    said = quickstart.stdout
    assert "| nitp | " in said and "report/index.html" in said and "nitp: step 1/3" in said
    # A newcomer is outside of the environment, which every other command needs.
    after = said[said.index("\nnext ") :].split("\n")
    assert "source .venv/bin/activate" in after[1] and "--checkpoint outputs/quickstart/nitp --out" in after[4]
    second = warm_python(*made_small(["scripts/quickstart.py"]), cwd=project)
    assert second.returncode == 0
    assert "ntp: already trained" in second.stdout and "nitp: already trained" in second.stdout
    assert "| nitp | " in second.stdout


MARKED = [command for command in every_command() if command.needs]


@pytest.mark.parametrize("command", MARKED, ids=str)
def test_a_command_that_no_test_can_run_names_what_there_is(command):
    words = list(command.words)
    values = dict(zip(words, words[1:]))
    for word in words:
        assert not word.startswith(("scripts/", "./scripts/", "tests/")) or (PROJECT / word).exists(), word
    if "--recipe" in values:
        recipe.read_settings(*recipe.locate(f"{values['--recipe']}@{values['--train-config']}"))
    for module in [values["-m"]] if "-m" in values and "torchrun" in words else []:
        assert find_spec(module), module


def test_the_convention_can_fail(project):
    assert commands("README.md")[0].needs is None
    with pytest.raises(AssertionError, match="no test knows how to run rm"):
        arguments_of_python(["rm", "-r", "outputs"], project)


def _text(path):
    return path.read_text(encoding="utf-8")


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_every_link_leads_to_a_file_and_a_heading(path):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _without_code(_text(path))):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in _anchors(_text(target))):
            wrong.append(link)
    assert wrong == []


# CHANGELOG.md has the old names.
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=_name)
def test_every_file_of_the_project_that_is_named_is_there(path):
    folders = (PROJECT, PROJECT / "nitp_titan", PROJECT / "scripts", PROJECT / "tests", path.parent)
    # Other files are those that a run writes.
    names = re.findall(r"`([\w.-]+(?:/[\w.-]+)*\.(?:py|sh|slurm)|[\w.-]+(?:/[\w.-]+)+/)`", _text(path))
    assert [name for name in names if not any((folder / name).exists() for folder in folders)] == []


def test_the_readme_is_short_and_counts_its_recipes():
    text = _text(PROJECT / "README.md")
    assert len(text.splitlines()) <= 150
    assert f"all {len(recipe.available('recipes'))} recipes" in text


def test_every_script_and_every_train_config_has_a_row():
    rows = _text(PROJECT / "scripts/README.md").partition("\n\n## ")[0]
    # Imported or sourced by others.
    inner = {"_checkout.py", "setup_venv.sh", "quickstart.py", "README.md", "__pycache__"}
    names = {path.name for path in (PROJECT / "scripts").iterdir()} - inner
    assert [name for name in names if name not in rows] == []
    table = re.findall(r"^\| `(\w+)` \| (\d+) \|", _text(PROJECT / "train_configs/README.md"), re.MULTILINE)
    assert sorted(name for name, _ in table) == recipe.available("train_configs")
    for name, ranks in table:
        assert recipe.read_toml(PROJECT / f"train_configs/{name}.toml")["machine"]["num_ranks"] == int(ranks)


def test_a_mistake_reads_as_the_readmes_show_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    good = _text(PROJECT / "recipes/debug/ntp_debug.toml")
    for document in ("README.md", "train_configs/README.md"):
        (shown,) = blocks(_text(PROJECT / document), "text")
        for line, added in zip(shown.splitlines(), ("stepz = 3", "local_batch_size = 3"), strict=True):
            (tmp_path / "recipes/my.toml").write_text(good.replace("[training]\n", f"[training]\n{added}\n"))
            with pytest.raises(UserError) as mistake:
                load_config(recipe.find("recipes/my.toml", "recipes"), recipe.find("cpu", "train_configs"))
            assert f"error: {mistake.value}".startswith(line.removesuffix("..."))


def test_a_nitp_recipe_is_as_short_as_the_readme_shows_it():
    (shown,) = blocks(_text(PROJECT / "README.md"), "toml")
    assert tomli.loads(shown) == recipe.read_toml(PROJECT / "recipes/dense/nitp_0.5b.toml")


@pytest.mark.parametrize("block", blocks(_text(PROJECT / "train_configs/README.md"), "toml"))
def test_tables_of_data_are_what_a_train_config_takes(block, tmp_path):
    head, _, rest = _text(PROJECT / "train_configs/cpu.toml").partition("[dataloader]")
    others = rest[rest.index("\n[") :]
    (tmp_path / "mine.toml").write_text(head + block + others)
    config = load_config(recipe.find("debug/ntp_debug", "recipes"), tmp_path / "mine.toml")
    for key, value in tomli.loads(block)["dataloader"].items():
        assert key == "sources" or getattr(config.dataloader, key) == value
