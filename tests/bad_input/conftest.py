"""The entry point up to where training would be built, in a copy of what a run reads."""

import contextlib
import io
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w

sys.path.insert(0, str(Path(__file__).resolve().parent))

import mistakes

from nitp_titan.config import recipe

PROJECT = recipe.PROJECT


class Accepted(Exception):
    """TorchTitan's trainer would be built now."""


@pytest.fixture(scope="module")
def project(assets, tmp_path_factory):
    """A copy of what a run reads: recipes, train configs and small assets of every name."""
    from tokenizers import models, Tokenizer

    folder = tmp_path_factory.mktemp("fuzz") / "project"
    for name in ("recipes", "train_configs"):
        shutil.copytree(PROJECT / name, folder / name)
    mistakes.lay_traps(folder)
    paths = {
        recipe.read_recipe(recipe.find(name, "recipes")).tables[""]["hf_assets_path"]
        for name in recipe.available("recipes")
    }
    for path in paths:
        (folder / path).mkdir(parents=True)
        Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1})).save(str(folder / path / "tokenizer.json"))
        shutil.copy(assets / "tokenizer_config.json", folder / path)
        for split in ("train", "validation"):
            (folder / path / f"{split}.jsonl").write_text('{"text": "some text"}\n')
    return folder


@pytest.fixture
def entry(project, monkeypatch):
    """Runs the entry point in the project folder up to where the process group would be made."""
    import torchtitan.train
    import tyro
    from torchtitan.components.quantization import Float8LinearConverter
    from torchtitan.config import manager
    from torchtitan.observability.structured_logger import structured_logging

    from nitp_titan import train
    from nitp_titan.machine import cpu
    from nitp_titan.runs import preflight

    def accept(config):
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
    monkeypatch.setattr(preflight, "_join_process_group", accept)
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
