"""Mistakes for every recipe and train config of a project folder, made by rules and a seed."""

import copy
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from nitp_titan.config import recipe

Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Mistake:
    """One file with one mistake."""

    file: str
    """The file, from the project folder."""

    kind: str
    what: str
    write: Callable[[Path], None]
    """Put the mistake in the file's place, where nothing is."""

    says: tuple[str, ...]
    """What the error has to name, beside the file."""

    names_file: bool = True

    @property
    def name(self) -> str:
        return f"{self.file}: {self.kind}: {self.what}"


class _File:
    """A shipped file, its settings, and draws that are the same every time."""

    def __init__(self, project: Path, file: str):
        self.file = file
        self.is_recipe = file.startswith("recipes/")
        self.text = (project / file).read_bytes()
        self.tables = tomli.loads(self.text.decode())
        self.values = list(_values(self.tables, ()))

    def draw(self, kind: str, options: list, count: int = 1) -> list:
        return random.Random(f"{self.file} {kind}").sample(options, min(count, len(options)))

    def with_value(self, path: Path_, value: Any) -> bytes:
        tables = copy.deepcopy(self.tables)
        _table(tables, path)[path[-1]] = value
        return tomli_w.dumps(tables).encode()

    def renamed(self, path: Path_, name: str) -> bytes:
        tables = copy.deepcopy(self.tables)
        table = _table(tables, path)
        table[name] = table.pop(path[-1])
        return tomli_w.dumps(tables).encode()

    def without(self, path: Path_) -> bytes:
        tables = copy.deepcopy(self.tables)
        del _table(tables, path)[path[-1]]
        return tomli_w.dumps(tables).encode()

    def mistake(self, kind: str, what: str, written: bytes | Callable[[Path], None], *says: str, **options) -> Mistake:
        write = written if callable(written) else (lambda path: path.write_bytes(written) and None)
        return Mistake(self.file, kind, what, write, says, **options)


def _values(table: dict[str, Any], above: Path_) -> Iterator[tuple[Path_, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _values(value, (*above, key))
        else:
            yield (*above, key), value


def _table(tables: dict[str, Any], path: Path_) -> dict[str, Any]:
    for name in path[:-1]:
        tables = tables[name]
    return tables


def _misspelt(word: str, at: int) -> str:
    """Two letters in the other order, or the last one twice where they are the same."""
    at %= max(1, len(word) - 1)
    swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
    return swapped if swapped != word else word + word[-1]


_OTHER_TYPES: dict[type, list[Any]] = {
    bool: [1, "true", 0.5, [True], datetime(2026, 1, 2)],
    int: ["ten", 2.5, True, [1], datetime(2026, 1, 2)],
    float: ["0.1", True, [0.1], datetime(2026, 1, 2)],
    str: [3, 0.5, True, [3], datetime(2026, 1, 2)],
    list: [3, "text", True, {"x": 1}, datetime(2026, 1, 2)],
}


def _wrong_type(file: _File) -> Iterator[Mistake]:
    for path, value in file.draw("type", file.values, 4):
        (other,) = file.draw(f"type of {path}", _OTHER_TYPES[type(value)])
        yield file.mistake("wrong type", f"{path} = {other!r}", file.with_value(path, other), path[-1])


def _table_for_a_value(file: _File) -> Iterator[Mistake]:
    for path, _ in file.draw("nested", file.values, 2):
        text = file.with_value(path, {"deep": {"er": 1}})
        yield file.mistake("table for a value", str(path), text, path[-1])


def _numbers(file: _File) -> list[tuple[Path_, Any]]:
    return [(path, value) for path, value in file.values if type(value) in (int, float)]


def _out_of_range(file: _File) -> Iterator[Mistake]:
    for path, value in file.draw("range", _numbers(file), 4):
        bad = [-3, -(10**6), 10**30, -(10**30)] if type(value) is int else [-0.5, -1e300, 1e300, 10**400]
        (other,) = file.draw(f"range of {path}", bad)
        what = f"{path} = {other:.3g}" if isinstance(other, float) else f"{path} of {other.bit_length()} bits"
        yield file.mistake("out of range", what, file.with_value(path, other), path[-1])


def _not_a_number(file: _File) -> Iterator[Mistake]:
    for path, _ in file.draw("nan", _numbers(file), 2):
        (other,) = file.draw(f"nan of {path}", [math.nan, math.inf, -math.inf])
        yield file.mistake("no finite number", f"{path} = {other}", file.with_value(path, other), path[-1])


def _bad_text(file: _File) -> Iterator[Mistake]:
    texts = [(path, value) for path, value in file.values if isinstance(value, str)]
    for path, _ in file.draw("text", texts, 2):
        (other,) = file.draw(f"text of {path}", ["", "  ", "nul\0byte", "two\nlines"])
        yield file.mistake("empty or odd text", f"{path} = {other!r}", file.with_value(path, other), path[-1])


def _unknown_key(file: _File) -> Iterator[Mistake]:
    for number, (path, _) in enumerate(file.draw("key", file.values, 3)):
        name = _misspelt(path[-1], number + 1)
        # The right word is among the choices, or a required one is said to be missing.
        yield file.mistake("unknown key", f"{path}: {name}", file.renamed(path, name), path[-1])


def _unknown_table(file: _File) -> Iterator[Mistake]:
    for name in file.draw("table", [name for name, value in file.tables.items() if isinstance(value, dict)], 2):
        odd = _misspelt(name, 2)
        yield file.mistake("unknown table", odd, file.renamed((name,), odd), name)


def _missing(file: _File) -> Iterator[Mistake]:
    if not file.is_recipe:
        # Without data there is no file that has the setting.
        text = file.without(("dataloader",))
        yield file.mistake("missing", "dataloader", text, "[dataloader] dataset_path is missing", names_file=False)
    elif "extends" not in file.tables:
        for table, key in [*recipe.REQUIRED_KEYS, ("optimizer", "lr")]:
            yield file.mistake("missing", f"{table} {key}", file.without((table, key)), f"[{table}] {key} is missing")
        yield file.mistake("missing", "model", file.without(("model",)), "[model] family is missing")
    else:
        yield file.mistake("missing", "extends", file.without(("extends",)), "[model] family is missing")


def _not_toml(file: _File) -> Iterator[Mistake]:
    draw = random.Random(file.file)
    at = draw.randrange(len(file.text))
    broken = file.text[:at] + b"\xff\xfe" + file.text[at:]
    yield file.mistake("not TOML", "bad UTF-8", broken, "is not UTF-8 text")
    sixteen = file.text.decode().encode("utf-16")
    yield file.mistake("not TOML", "UTF-16", sixteen, "is not UTF-8 text")
    lines = [number for number, line in enumerate(file.text.splitlines()) if b" = " in line and line[:1] != b"#"]
    line = draw.choice(lines)
    kept = file.text.splitlines()
    cut = b"\n".join([*kept[:line], kept[line].partition(b" = ")[0] + b" ="])
    yield file.mistake("not TOML", "cut off", cut, "is not valid TOML")
    twice = b"\n".join([*kept[: line + 1], kept[line], *kept[line + 1 :]])
    yield file.mistake("not TOML", f"line {line} twice", twice, "is not valid TOML")
    tables = json.dumps(file.tables, default=str).encode()
    yield file.mistake("not TOML", "JSON", tables, "is not valid TOML")
    yield file.mistake("not TOML", "huge", file.text + b"#" * 1_000_001, "is larger than 1,000,000 bytes")
    digits = b"x = " + b"1" * 100_000 + b"\n" + file.text
    yield file.mistake("not TOML", "a number of 100,000 digits", digits, "is not valid TOML")
    deep = b"x = " + b"[" * 100_000 + b"\n" + file.text
    yield file.mistake("not TOML", "100,000 brackets", deep, "is not valid TOML")


def _no_file(file: _File) -> Iterator[Mistake]:
    yield file.mistake("no file", "missing", lambda path: None, "does not exist")
    yield file.mistake("no file", "folder", lambda path: path.mkdir(), "is a folder")
    yield file.mistake("no file", "pipe", lambda path: os.mkfifo(path), "is a pipe, socket or device")
    device = lambda path: path.symlink_to("/dev/zero")  # noqa: E731
    yield file.mistake("no file", "endless device", device, "is a pipe, socket or device")
    # Reading it fails for root too.
    unreadable = lambda path: path.symlink_to("/proc/self/mem")  # noqa: E731
    yield file.mistake("no file", "unreadable", unreadable, "cannot be read")
    yield file.mistake("no file", "link to itself", lambda path: path.symlink_to(path.name), "")


def _wrong_file(file: _File) -> Iterator[Mistake]:
    if file.is_recipe:
        other = (recipe.PROJECT / "train_configs/cpu.toml").read_bytes()
        yield file.mistake("wrong file", "a train config", other, "is missing")
        for addition in ("compile", "checkpoint", "parallelism"):
            text = tomli_w.dumps({**file.tables, addition: {"enable": True}}).encode()
            says = ("belongs to a train config",) if addition != "parallelism" else ("enable",)
            yield file.mistake("key of the other file", addition, text, f"[{addition}]", *says)
    else:
        other = (recipe.PROJECT / "recipes/debug/ntp_debug.toml").read_bytes()
        yield file.mistake("wrong file", "a recipe", other, "belongs to a recipe")
        for addition, key, value in (("nitp", "weight", 0.5), ("optimizer", "lr", 0.1), ("debug", "seed", 1)):
            text = tomli_w.dumps({**file.tables, addition: {key: value}}).encode()
            yield file.mistake("key of the other file", addition, text, f"[{addition}] {key} belongs to a recipe")


def _value_for_a_table(file: _File) -> Iterator[Mistake]:
    names = [name for name, value in file.tables.items() if isinstance(value, dict)]
    for name in file.draw("value for a table", names, 2):
        (value,) = file.draw(f"value for {name}", [3, "text", [file.tables[name]], True, datetime(2026, 1, 2)])
        text = file.with_value((name,), value)
        yield file.mistake("value for a table", f"{name} = {value!r}", text, f"[{name}] must be a table")


def _wrong_base(file: _File) -> Iterator[Mistake]:
    if not file.is_recipe:
        text = tomli_w.dumps({"extends": "cpu.toml", **file.tables}).encode()
        yield file.mistake("wrong base", "of a train config", text, "only recipes do")
        return
    name = Path(file.file).name
    bases = {
        name: "a recipe cannot extend itself",
        f"../{Path(file.file).parent.name}/{name}": "a recipe cannot extend itself",
        "missing.toml": "missing.toml does not exist",
        "../../../outside.toml": "is outside of",
        "../../../../../../../../etc/passwd": "must be the path of a recipe",
        "/etc/hosts.toml": "must be the path of a recipe",
        "base": "must be the path of a recipe",
        "nul\0.toml": "must be the path of a recipe",
        "../link_to_outside.toml": "is outside of",
        "../pipe.toml": "is a pipe, socket or device",
        "../folder.toml": "is a folder",
        "../cycle.toml": "extends nothing (one level only)",
        "../link_to_itself.toml": "",
    }
    for base, message in file.draw("base", list(bases.items()), 5):
        text = tomli_w.dumps({**file.tables, "extends": base}).encode()
        yield file.mistake("wrong base", repr(base), text, "extends", message)


RULES = (
    _wrong_type,
    _table_for_a_value,
    _out_of_range,
    _not_a_number,
    _bad_text,
    _unknown_key,
    _unknown_table,
    _missing,
    _not_toml,
    _no_file,
    _wrong_file,
    _value_for_a_table,
    _wrong_base,
)


def lay_traps(project: Path) -> None:
    """What `_wrong_base` points to, beside the recipes of a project folder."""
    (project.parent / "outside.toml").write_text("secret = 1\n")
    (project / "recipes/link_to_outside.toml").symlink_to(project.parent / "outside.toml")
    (project / "recipes/link_to_itself.toml").symlink_to("link_to_itself.toml")
    (project / "recipes/cycle.toml").write_text('extends = "cycle.toml"\n')
    (project / "recipes/folder.toml").mkdir()
    os.mkfifo(project / "recipes/pipe.toml")


def mistakes(project: Path, files: list[str]) -> list[Mistake]:
    """All mistakes of all files, by the rules."""
    return [mistake for name in files for rule in RULES for mistake in rule(_File(project, name))]
