"""Every shipped recipe and train config with every kind of mistake: one line, and nothing written."""

import contextlib
import fnmatch
import gzip
import io
import json
import os
import random
import runpy
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import bad_input
import pytest
import tomli_w
from bad_input import Mistake

from nitp_titan import recipe

PROJECT = recipe.PROJECT
FILES = [f"{folder}/{name}.toml" for folder in ("recipes", "train_configs") for name in recipe.available(folder)]
RECIPES = recipe.available("recipes")
MISTAKES = bad_input.mistakes(PROJECT, FILES)
KINDS = sorted({mistake.kind for mistake in MISTAKES})


class Accepted(Exception):
    """TorchTitan's trainer would be built now."""


@pytest.fixture(scope="module")
def project(assets, tmp_path_factory):
    """A copy of what a run reads: recipes, train configs and small assets of every name."""
    from tokenizers import models, Tokenizer

    folder = tmp_path_factory.mktemp("fuzz") / "project"
    for name in ("recipes", "train_configs"):
        shutil.copytree(PROJECT / name, folder / name)
    bad_input.lay_traps(folder)
    paths = {recipe.read_recipe(recipe.find(name, "recipes")).tables[""]["hf_assets_path"] for name in RECIPES}
    for path in paths:
        (folder / path).mkdir(parents=True)
        Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1})).save(str(folder / path / "tokenizer.json"))
        shutil.copy(assets / "tokenizer_config.json", folder / path)
        for split in ("train", "validation"):
            (folder / path / f"{split}.jsonl").write_text('{"text": "some text"}\n')
    return folder


@pytest.fixture
def entry(project, monkeypatch):
    """Runs the entry point in the project folder up to where TorchTitan's trainer would be built."""
    import torchtitan.train
    import tyro
    from torchtitan.components.quantization import Float8LinearConverter
    from torchtitan.config import manager
    from torchtitan.observability.structured_logger import structured_logging
    from torchtitan.trainer import Trainer

    from nitp_titan import cpu, train

    def build(self, config):
        raise Accepted

    def run(*arguments: str, num_ranks: int = 1) -> tuple[str, str]:
        """(what the process ends with, what it wrote to stderr before)."""
        # TorchTitan adds its rules to it with every start, and it becomes slow.
        monkeypatch.setattr(manager, "custom_registry", tyro.constructors.ConstructorRegistry())
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
        written = io.StringIO()
        with contextlib.redirect_stderr(written), contextlib.redirect_stdout(written):
            try:
                train.main()
            except SystemExit as end:
                return end.code, written.getvalue()
            except Accepted:
                return "accepted", written.getvalue()
        return "ended", written.getvalue()

    monkeypatch.chdir(project)
    monkeypatch.setattr(Trainer, "__init__", build)
    # Train configs for GPUs and full disks are read here too.
    monkeypatch.setattr(cpu, "prepare", lambda config: config)
    monkeypatch.setattr(
        Float8LinearConverter.Config, "build", lambda self: SimpleNamespace(convert=lambda model: model)
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**13))
    monkeypatch.setattr(torchtitan.train, "init_logger", lambda: None)
    # It is begun once a process, and its file is the one thing that may be written.
    monkeypatch.setattr(structured_logging, "_is_initialized", True)
    return run


def _partner(file: str) -> tuple[str, str, int]:
    """Recipe and train config of a run with a file, and the number of its ranks."""
    folder, _, name = file.removesuffix(".toml").partition("/")
    for train_config in recipe.available("train_configs"):
        machine = recipe.read_toml(PROJECT / f"train_configs/{train_config}.toml")["machine"]
        fitting = [name for pattern in machine["recipes"] for name in fnmatch.filter(RECIPES, pattern)]
        if folder == "train_configs" and name == train_config:
            return f"recipes/{fitting[0]}.toml", file, machine["num_ranks"]
        if folder == "recipes" and name in fitting:
            return file, f"train_configs/{train_config}.toml", machine["num_ranks"]
    raise AssertionError(f"{file} is meant for nothing")


def _tree(folder: Path) -> dict[str, tuple]:
    """What is in a folder; of folders only that they are there."""
    found = {}
    for place, folders, files in os.walk(folder):
        found |= {f"{place}/{name}": () for name in folders}
        for name in files:
            status = os.lstat(f"{place}/{name}")
            found[f"{place}/{name}"] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def _complaint(mistake: Mistake, project: Path, entry) -> str | None:
    """What is wrong with how a mistake is refused; None if nothing is."""
    path, kept = project / mistake.file, project.parent / "kept.toml"
    path.rename(kept)
    try:
        mistake.write(path)
        recipe_file, train_config, num_ranks = _partner(mistake.file)
        before, start = _tree(project), time.monotonic()
        # Whole paths: what is missing here would be taken from the project.
        arguments = ["--recipe", str(project / recipe_file), "--train-config", str(project / train_config)]
        end, written = entry(*arguments, num_ranks=num_ranks)
        seconds, after = time.monotonic() - start, _tree(project)
    except Exception as error:
        return f"{mistake.name}: {type(error).__name__}: {error}"
    finally:
        _remove(path)
        kept.rename(path)
    wrong = [f"does not say {word!r}" for word in mistake.says if word not in str(end)]
    if mistake.names_file and mistake.file not in str(end):
        wrong.append("does not name the file")
    if not isinstance(end, str) or not end.startswith("error: ") or len(end.splitlines()) != 1 or len(end) > 2000:
        wrong.append("is not one line")
    if "Traceback" in written or "error: " in written:
        wrong.append(f"wrote {written}")
    if seconds > 10:
        wrong.append(f"took {seconds:.1f} s")
    if before != after:
        wrong.append(f"changed {sorted(before.items() ^ after.items())}")
    return f"{mistake.name}: {', '.join(wrong)}: {end}" if wrong else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def test_there_are_many_mistakes_and_of_every_file_every_kind():
    names = [mistake.name for mistake in MISTAKES]
    assert len(set(names)) == len(names) >= 500
    kinds = Counter(mistake.kind for mistake in MISTAKES)
    assert all(number >= len(FILES) - 10 for number in kinds.values()), kinds
    assert {mistake.file for mistake in MISTAKES} == set(FILES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_ends_with_one_line_that_names_it_and_nothing_written(project, entry, kind):
    complaints = [_complaint(mistake, project, entry) for mistake in MISTAKES if mistake.kind == kind]
    found = [complaint for complaint in complaints if complaint]
    assert not found, f"{len(found)} of {len(complaints)}:\n" + "\n".join(found)


def test_every_train_config_itself_is_accepted(project, entry):
    for file in (name for name in FILES if name.startswith("train_configs/")):
        recipe_file, train_config, num_ranks = _partner(file)
        end, _ = entry("--recipe", recipe_file, "--train-config", train_config, num_ranks=num_ranks)
        assert end == "accepted", f"{file}: {end}"


TEXT, TOKENIZER = "assets/stdlib/train.jsonl", "assets/stdlib/tokenizer.json"


def _parquet(rows: list[dict]):
    def write(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema([("body", pyarrow.string())]))
        pyarrow.parquet.write_table(table, path)

    return write


def _bytes(content: bytes):
    return lambda path: path.write_bytes(content)


_GZIP = gzip.compress(b'{"text": "some text"}\n' * 1000)

# Name: the file, what is put in its place, changes of [dataloader], and what the error says.
SURROUNDINGS = {
    "no tokenizer": (
        "assets/stdlib/tokenizer.json",
        None,
        {},
        "hf_assets_path = 'assets/stdlib' holds no tokenizer.json",
    ),
    "a tokenizer that is no JSON": (TOKENIZER, _bytes(b"{"), {}, "holds no tokenizer that loads"),
    "a tokenizer of bytes": (TOKENIZER, _bytes(b"\xff\x00"), {}, "holds no tokenizer that loads"),
    "JSON that is no tokenizer": (TOKENIZER, _bytes(b"{}"), {}, "holds no tokenizer that loads"),
    "settings that are no JSON": ("assets/stdlib/tokenizer_config.json", _bytes(b"["), {}, "no tokenizer that loads"),
    "no data": (TEXT, None, {}, f"[dataloader] dataset_path = '{TEXT}' names no file"),
    "empty data": (TEXT, _bytes(b""), {}, "train.jsonl, line 1 is not a JSON object"),
    "a folder without data": (TEXT, Path.mkdir, {}, f"[dataloader] dataset_path = '{TEXT}' names no file"),
    "a pipe for data": (TEXT, os.mkfifo, {}, f"[dataloader] dataset_path = '{TEXT}' names no file"),
    "data that is not UTF-8": (TEXT, _bytes(b'{"text": "\xff"}\n'), {}, "train.jsonl, line 1 is not a JSON object"),
    "a list for a document": (TEXT, _bytes(b"[1]\n"), {}, "train.jsonl, line 1 is not a JSON object"),
    "no such field": (TEXT, _bytes(b'{"txt": "x"}\n'), {}, "[dataloader] text_field = 'text': a document of"),
    "another field": (TEXT, _bytes(b'{"text": "x"}\n'), {"text_field": "txet"}, "Did you mean 'text'?"),
    "a number for text": (TEXT, _bytes(b'{"text": 3}\n'), {}, "[dataloader] text_field = 'text': a document of"),
    "gzip that is none": ("x.jsonl.gz", _bytes(b"plain"), {"dataset_path": "x.jsonl.gz"}, "x.jsonl.gz, line 1 is not"),
    "gzip cut short": ("x.jsonl.gz", _bytes(_GZIP[:12]), {"dataset_path": "x.jsonl.gz"}, "x.jsonl.gz, line 1 is not"),
    "empty parquet": ("x.parquet", _parquet([]), {"dataset": "parquet", "dataset_path": "x.parquet"}, "no first row"),
    "parquet that is none": (
        "x.parquet",
        _bytes(b"PAR1"),
        {"dataset": "parquet", "dataset_path": "x.parquet"},
        "x.parquet, there is no first row",
    ),
    "parquet without the field": (
        "x.parquet",
        _parquet([{"body": "x"}]),
        {"dataset": "parquet", "dataset_path": "x.parquet"},
        "[dataloader] text_field = 'text': a document of x.parquet, row 1 has no such text",
    ),
    "too many workers": (
        TEXT,
        _bytes(b'{"text": "x"}\n'),
        {"num_workers": 2},
        "num_workers = 2, but it must be 0 or 1",
    ),
}


@pytest.fixture
def machine(project):
    """Write a train config for the CPU with changes by table; gives its path."""
    path = project / "machine.toml"

    def write(**changes) -> str:
        tables = recipe.read_toml(PROJECT / "train_configs/cpu.toml")
        for name, values in changes.items():
            tables[name] = {**tables.get(name, {}), **values} if isinstance(values, dict) else values
        path.write_text(tomli_w.dumps(tables))
        return "machine.toml"

    yield write
    path.unlink(missing_ok=True)


def _is_one_line(end: str) -> bool:
    return isinstance(end, str) and end.startswith("error: ") and len(end.splitlines()) == 1


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_missing_and_broken_assets_are_one_line_that_names_the_setting(project, entry, machine, tmp_path, name):
    file, write, dataloader, message = SURROUNDINGS[name]
    train_config = machine(dataloader=dataloader)
    shutil.copytree(project / "assets/stdlib", tmp_path / "kept")
    try:
        (project / file).unlink(missing_ok=True)
        if write is not None:
            write(project / file)
        before = _tree(project)
        end, _ = entry("--recipe", "debug/nitp_debug", "--train-config", train_config)
        assert _tree(project) == before
    finally:
        _remove(project / file)
        shutil.rmtree(project / "assets/stdlib")
        shutil.copytree(tmp_path / "kept", project / "assets/stdlib")
    place = "recipes/debug/ntp_debug.toml" if "tokenizer" in file else "machine.toml"
    assert _is_one_line(end) and message in end and end.startswith(f"error: {place}: "), end


@pytest.mark.parametrize(
    ("dump_folder", "log", "message"),
    [
        ("/proc/run", True, "cannot be written: /proc: "),
        ("/proc/run", False, "cannot be written: /proc: "),
        ("recipes/README.md/run", True, "recipes/README.md: Not a directory"),
        ("recipes/README.md", False, "recipes/README.md: Not a directory"),
        ("long/" + "x" * 300, True, "File name too long"),
    ],
)
def test_a_run_folder_that_cannot_be_made_is_one_line(project, entry, machine, monkeypatch, dump_folder, log, message):
    from torchtitan.observability.structured_logger import structured_logging

    monkeypatch.setattr(structured_logging, "_is_initialized", False)
    (project / "recipes/README.md").touch()
    train_config = machine(dump_folder=dump_folder, debug={"enable_structured_logging": log})
    before = _tree(project)
    end, _ = entry("--recipe", "debug/nitp_debug", "--train-config", train_config)
    assert _is_one_line(end) and message in end and end.startswith("error: machine.toml: dump_folder = '"), end
    assert _tree(project) == before


def test_a_disk_too_small_for_one_checkpoint_is_refused_with_both_figures(entry, machine, monkeypatch):
    # 1,192,800 parameters of the model and 110,592 of the projector; with Adam three numbers of 4 bytes each.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    end, _ = entry("--recipe", "debug/nitp_debug", "--train-config", machine())
    assert end == (
        "error: machine.toml: dump_folder = 'outputs/debug/nitp_debug': one checkpoint needs 0.016 GB and the disk has "
        "0.010 GB free; choose another dump_folder, or [checkpoint] enable = false."
    )
    without = machine(checkpoint={"enable": False})
    assert entry("--recipe", "debug/nitp_debug", "--train-config", without)[0] == "accepted"


@pytest.fixture(scope="module")
def saved(assets, tmp_path_factory):
    """A run of three steps with its checkpoints, and its Hugging Face model."""
    from helpers import saved_run

    from nitp_titan.checkpoint.saved import Checkpoint
    from nitp_titan.hf.export import Export

    folder = tmp_path_factory.mktemp("saved")
    saved_run(folder / "run", generated_data=False)
    Export(Checkpoint(folder / "run")).write(folder / "hf")
    return folder


def _cut(name: str):
    def cut(folder: Path) -> None:
        (path,) = folder.glob(name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def _scribble(name: str):
    def scribble(folder: Path) -> None:
        (path,) = folder.glob(name)
        content = bytearray(path.read_bytes())
        content[8:200] = random.Random(0).randbytes(192)
        path.write_bytes(content)

    return scribble


def _edit_config(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "qwen2"}))


STEP = "checkpoint/step-3"
# Name: what is started from, the recipe, what is done to it before, and what the error says.
CHECKPOINTS = {
    "missing": ("rnu", "debug/nitp_debug", None, "is not a folder. Did you mean"),
    "half-written": ("run/" + STEP, "debug/nitp_debug", lambda f: (f / ".metadata").unlink(), "was interrupted"),
    "empty": ("run/" + STEP, "debug/nitp_debug", lambda f: shutil.rmtree(f) or f.mkdir(), "no complete checkpoint"),
    "of another model": ("run/" + STEP, "debug/nitp_qwen3_debug", None, "q_norm.weight', which the model needs"),
    "with experts": ("run/" + STEP, "debug/nitp_moe_debug", None, "for which the model has no place"),
    "metadata cut": ("run/" + STEP, "debug/nitp_debug", _cut(".metadata"), ".metadata"),
    "metadata overwritten": ("run/" + STEP, "debug/nitp_debug", _scribble(".metadata"), ".metadata"),
    "data cut": ("run/" + STEP, "debug/nitp_debug", _cut("__0_0.distcp"), "__0_0.distcp"),
    "data missing": ("run/" + STEP, "debug/nitp_debug", lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp"),
    "safetensors cut": ("hf", "debug/nitp_debug", _cut("*.safetensors"), "model.safetensors cannot be read"),
    "safetensors overwritten": (
        "hf",
        "debug/nitp_debug",
        _scribble("*.safetensors"),
        "model.safetensors cannot be read",
    ),
    "no safetensors": ("hf", "debug/nitp_debug", lambda f: (f / "model.safetensors").unlink(), "holds no safetensors"),
    "config of another model": (
        "hf",
        "debug/nitp_debug",
        _edit_config,
        "model_type = 'qwen2', but the recipe's model has",
    ),
    "config cut": ("hf", "debug/nitp_debug", _cut("config.json"), "config.json"),
    "safetensors of another model": ("hf", "debug/nitp_qwen3_debug", None, "config.json: model_type = 'llama', but"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_one_line_and_nothing_is_written(
    saved, project, entry, machine, tmp_path, name
):
    place, recipe_name, change, message = CHECKPOINTS[name]
    shutil.copytree(saved, tmp_path / "start")
    path = tmp_path / "start" / place
    if change is not None:
        change(path)
    in_hf = place == "hf"
    train_config = machine(checkpoint={"initial_load_path": str(path), "initial_load_in_hf": in_hf})
    before = _tree(project)
    end, _ = entry("--recipe", recipe_name, "--train-config", train_config)
    assert _is_one_line(end) and message in end, end
    assert end.startswith("error: machine.toml: [checkpoint] initial_load_path: "), end
    assert _tree(project) == before


def test_all_ranks_end_with_one_line_for_a_checkpoint_of_another_model(torchrun, saved, tmp_path):
    start = time.monotonic()
    flags = ["--checkpoint.initial_load_path", str(saved / "run"), "--dump_folder", str(tmp_path / "run")]
    flags += ["--training.local_batch_size", "8"]
    done = torchrun(2, "-m", "nitp_titan.train", "--recipe", "debug/nitp_qwen3_debug", "--train-config", "cpu", *flags)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "which the model needs" in line
    # torchrun writes a traceback of its own.
    assert "nitp_titan/trainer.py" not in done.stderr
    assert time.monotonic() - start < 90 and not (tmp_path / "run/resolved.toml").exists()


def test_what_one_rank_alone_misses_ends_all_with_its_line(torchrun, tmp_path):
    """Rank 1 looks from a folder without data."""
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    text = recipe.read_toml(PROJECT / "train_configs/cpu.toml")
    text["dataloader"]["dataset_path"] = "mine.jsonl"
    text["training"]["local_batch_size"] = 8
    (tmp_path / "machine.toml").write_text(tomli_w.dumps(text | {"dump_folder": str(tmp_path / "run")}))
    (tmp_path / "0/mine.jsonl").write_text('{"text": "some text"}\n')
    for rank in ("0", "1"):
        (tmp_path / rank / "assets").symlink_to(PROJECT / "assets")
    start = time.monotonic()
    script = str(PROJECT / "tests/from_own_folder.py")
    done = torchrun(2, script, str(tmp_path), "--recipe", "debug/nitp_debug", "--train-config", "../machine.toml")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "dataset_path = 'mine.jsonl' names no file" in line
    assert "nitp_titan/trainer.py" not in done.stderr and time.monotonic() - start < 120


# Script and arguments, and what its one line says.
SCRIPTS = [
    ("recipe.py", "show", "debug/nitp_debgu", "recipes/debug/nitp_debug.toml'?"),
    ("recipe.py", "show", "/dev/zero.toml", "/dev/zero.toml does not exist"),
    ("recipe.py", "show", "pipe.toml", "pipe.toml is a pipe, socket or device"),
    ("recipe.py", "show", "debug/nitp_debug", "cup", "cup.toml does not exist. Did you mean"),
    ("recipe.py", "show", "bad.toml", "bad.toml: [model] family is missing. Did you mean 'model' by 'modle'?"),
    ("recipe.py", "diff", "debug/nitp_debug", "bad.toml", "bad.toml: [model] family is missing"),
    ("recipe.py", "check", "debug/nitp_debgu", "Did you mean"),
    ("export_hf.py", "--checkpoint", "nowhere", "--out", "hf", "nowhere is not a folder"),
    ("export_hf.py", "--checkpoint", "bad.toml", "--out", "hf", "bad.toml is not a folder"),
    ("export_hf.py", "--checkpoint", "empty", "--out", "hf", "empty holds no complete checkpoint"),
    ("evaluate.py", "--model", "empty", "--suite", "paper", "empty holds no config.json"),
    ("evaluate.py", "--model", "empty", "--text", "nowhere.jsonl", "empty"),
    ("evaluate.py", "--model", "empty", "--text", "nowhere.jsonl", "--dtype", "float31", "Did you mean 'float32'"),
    ("evaluate.py", "--model", "empty", "--text", "nowhere.jsonl", "--device", "gpu9", "--device gpu9"),
    ("probe_geometry.py", "--model", "empty", "--text", "nowhere.jsonl", "--out", "out", "empty"),
    ("probe_geometry.py", "--model", "empty", "--text", "bad.toml", "--seq-len", "0", "--out", "out", ""),
    ("compare.py", "nowhere", "--out", "out", "nowhere"),
    ("compare.py", "empty", "--out", "out", "empty"),
    ("compare.py", "empty", "--out", "bad.toml/x", ""),
    ("study.py", "--arm", "nipt", "Did you mean 'nitp'?"),
    ("study.py", "--report", "--out", "nowhere", "nowhere"),
    ("study.py", "--parallel", "0", "--parallel 0: 1 to"),
    ("prepare_local_suite.py", "--text", "nowhere.jsonl", "nowhere.jsonl"),
    ("download_assets.py", "qwne2", "Did you mean 'qwen2'?"),
]


@pytest.mark.parametrize("case", SCRIPTS, ids=lambda case: " ".join(case[:-1]))
def test_a_script_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, case):
    script, *arguments, message = case
    (tmp_path / "bad.toml").write_text('[modle]\nfamily = "llama3"\n')
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    before = _tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(PROJECT / "scripts" / script), run_name="__main__")
    written = capsys.readouterr()
    assert "Traceback" not in written.out + written.err
    assert _is_one_line(end.value.code) and message in end.value.code, end.value.code
    assert _tree(tmp_path) == before
