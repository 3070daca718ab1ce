"""Arrows between rooms run down, imports stand at the head of a file, and what is imported is declared."""

import ast
import re
import sys
from pathlib import Path

import tomli
from processes import PROJECT

PACKAGE = "nitp_titan"
# From the bottom up: a room imports rooms before it. nitp_titan/README.md has their jobs.
ROOMS = [
    *("errors", "files", "step_files", "progress", "difference", "markdown"),
    *("machine", "objectives", "geometry", "models", "data", "config", "checkpoint", "export", "runs", "training"),
    *("sizing", "evaluation", "report", "cli"),
    *("config_registry", "torchrun", "train", "__init__"),
]
# Imports inside functions, each with its reason.
NO_TORCH = "listing recipes, and a wrong argument, need no torch, which takes seconds"
OPTIONAL = "of the extra `eval`, which training does without"
FLAGS = "after the arguments are right; TorchTitan takes seconds"
LATE = {
    ("config/recipe.py", "torch"): NO_TORCH,
    ("train.py", "torchtitan"): FLAGS,
    ("train.py", "tyro"): FLAGS,
    ("data/assets.py", "tokenizers"): "in a process of its own, without the environment, this file makes the corpus",
    ("data/hub.py", "datasets"): "it reads the environment when it is imported, and this sets it",
    ("data/hub.py", "huggingface_hub"): "the same",
    ("data/hub.py", "nitp_titan"): "with the tokenizer comes a part of TorchTitan, which fetching does without",
    ("evaluation/embeddings.py", "mteb"): OPTIONAL,
    ("evaluation/geometry.py", "transformers"): OPTIONAL,
    ("evaluation/harness.py", "lm_eval"): OPTIONAL,
    ("evaluation/harness.py", "nitp_titan"): "language_model.py needs lm_eval, " + OPTIONAL,
    ("evaluation/models.py", "transformers"): OPTIONAL,
    ("evaluation/models.py", "huggingface_hub"): OPTIONAL,
    ("evaluation/perplexity.py", "huggingface_hub"): OPTIONAL,
    ("evaluation/pretrained.py", "transformers"): OPTIONAL,
}
FILES = sorted((PROJECT / PACKAGE).rglob("*.py"))


def _imports(path: Path):
    """(module, line, whether inside a function) of every import of a file."""
    tree = ast.parse(path.read_text())
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from ((name, node.lineno, id(node) in inside) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, id(node) in inside) for alias in node.names)


def _room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py") if parts else "__init__"


def test_a_room_imports_only_rooms_below_it():
    wrong = []
    for path in FILES:
        own = _room(path.relative_to(PROJECT / PACKAGE).parts)
        for module, line, _ in _imports(path):
            room = _room(tuple(module.split(".")[1:2])) if module.startswith(f"{PACKAGE}.") else own
            if room in ROOMS and ROOMS.index(room) > ROOMS.index(own):
                wrong.append(f"{path.relative_to(PROJECT)}:{line}: {own} imports {room}, which is above it")
    assert wrong == []


def test_every_room_is_in_the_order_and_in_the_map():
    found = {_room(path.relative_to(PROJECT / PACKAGE).parts) for path in FILES}
    assert found == set(ROOMS)
    text = (PROJECT / PACKAGE / "README.md").read_text()
    assert [room for room in ROOMS[:-1] if f"`{room}/`" not in text and f"`{room}.py`" not in text] == []


def test_files_of_the_package_import_each_other_in_no_circle():
    modules = {
        ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
    }
    below = {name: {module for module, *_ in _imports(path)} & {*modules} - {name} for name, path in modules.items()}
    while ready := [name for name, others in below.items() if not others & {*below}]:
        for name in ready:
            del below[name]
    assert sorted(below) == []


def test_a_name_in_a_package_is_not_the_name_of_a_file_beside_it():
    """Importing the file would put itself in the place of what has the name."""
    wrong = []
    for path in (path for path in FILES if path.name == "__init__.py"):
        beside = {other.stem for other in path.parent.iterdir()}
        for node in ast.parse(path.read_text()).body:
            aliases = node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
            names = {getattr(node, "name", None), *(alias.asname or alias.name for alias in aliases)}
            wrong += [f"{path.relative_to(PROJECT)}:{node.lineno}: {name}" for name in names & beside]
    assert wrong == []


def test_imports_inside_functions_have_a_reason():
    found = {
        (str(path.relative_to(PROJECT / PACKAGE)), module.partition(".")[0])
        for path in FILES
        for module, _, late in _imports(path)
        if late
    }
    assert found == set(LATE)


def test_what_the_package_imports_is_declared():
    project = tomli.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["eval"]]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}
    imported = {module.partition(".")[0] for path in FILES for module, *_ in _imports(path)}
    assert imported - {PACKAGE, *sys.stdlib_module_names} - declared == set()
