"""Recipes and train configs: TOML to tables, each key with the file that sets it.

A recipe says what is trained, a train config where and how it runs; every key belongs to exactly one of the two.
Imports torch only to choose between the train configs `gpu` and `cpu`.
"""

import dataclasses
import difflib
import os
import stat
from pathlib import Path
from typing import Any

import tomli

from nitp_titan.config.tables import entries
from nitp_titan.errors import nearest_choice, short_repr, UserError

_PACKAGE = Path(__file__).resolve().parents[1]
# `pip install .` puts recipes/ and train_configs/ into the package; in a checkout they lie beside it (setup.py).
PROJECT = _PACKAGE if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent
_MAX_BYTES = 1_000_000

# What is trained. Every other key says where and how, and belongs to a train config.
RECIPE_KEYS: dict[str, set[str] | None] = {
    # The tokenizer: it gives tokens and losses their meaning.
    "": {"hf_assets_path"},
    "model": {"family", "flavor"},
    "nitp": None,
    "optimizer": {"lr", "betas", "eps", "weight_decay", "param_groups"},
    "lr_scheduler": None,
    "training": {"seq_len", "global_batch_size", "steps", "max_norm"},
    # The order of the sequences. Where the text is belongs to a train config.
    "dataloader": {"num_streams", "seed", "shuffle"},
    "bad_steps": None,
    "debug": {"seed"},
}
# Looked for in the working directory, then in the project.
_PATH_KEYS = ("hf_assets_path", "dataset_path")
REQUIRED_KEYS = [
    ("model", "family"),
    ("model", "flavor"),
    ("training", "seq_len"),
    ("training", "global_batch_size"),
    ("training", "steps"),
]


@dataclasses.dataclass
class Settings:
    """Merged tables of one run, with the file that each key comes from.

    Top-level keys live in the table ``""``.
    """

    tables: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    origins: dict[tuple[str, str], Path] = dataclasses.field(default_factory=dict)
    misplaced: list[str] = dataclasses.field(default_factory=list)
    """Keys in the wrong kind of file; complained about once it is clear that they exist at all."""

    def add(self, table: str, key: str, value: Any, origin: Path) -> None:
        if not table and key in RECIPE_KEYS:
            raise UserError(f"{origin}: [{key}] must be a table, not {short_repr(value)}.")
        self.tables.setdefault(table, {})[key] = value
        self.origins[table, key] = origin

    def location(self, table: str | None, key: str | None = None) -> str:
        """``"file: "`` of a setting, or of its table, or nothing where no file set it."""
        top, _, nested = (table or "").partition(".")
        if nested:
            return self.location(top, nested.partition(".")[0])
        if table is not None and key is not None and (table, key) in self.origins:
            return f"{self.origins[table, key]}: "
        # A recipe does not set the keys of a train config, nor the other way round.
        files = [
            origin
            for (name, other), origin in self.origins.items()
            if name == table and (key is None or is_recipe_key(name, other) == is_recipe_key(name, key))
        ]
        return f"{files[-1]}: " if files else ""


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; UserError names the file, and the line of a mistake."""
    try:
        return tomli.loads(_read_file(path).decode("utf-8"))
    except FileNotFoundError:
        siblings = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise UserError(f"{path} does not exist.{nearest_choice(str(path), siblings)}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start}.") from None
    except (ValueError, RecursionError) as error:
        # Not tomli's own: a number of thousands of digits, brackets that open thousands deep.
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _read_file(path: Path) -> bytes:
    """Content of a regular file of a size that people write; a pipe or a device would be read for ever."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        what = "a folder" if kind == stat.S_IFDIR else "a pipe, socket or device"
        raise UserError(f"{path} is {what}, not a TOML file.")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path} is larger than {_MAX_BYTES:,} bytes: not a recipe or train config.")
    return content


def is_recipe_key(table: str, key: str) -> bool:
    """Whether a setting says what is trained, and belongs to a recipe."""
    keys = RECIPE_KEYS.get(table, set())
    return keys is None or key in keys


def _check_base(path: Path, base: Any) -> None:
    """Raise UserError unless ``base`` is a recipe near ``path``: nobody's recipe reads files from anywhere."""
    place = f"{path}: extends = {short_repr(base)}"
    if not isinstance(base, str) or not base.endswith(".toml") or "\0" in base or Path(base).is_absolute():
        raise UserError(f"{place}, but it must be the path of a recipe (.toml), from this one's folder.")
    try:
        found = (path.parent / base).resolve()
    except (OSError, RuntimeError):
        raise UserError(f"{place} goes round in a circle of links.") from None
    if found == path.resolve():
        raise UserError(f"{place}: a recipe cannot extend itself.")
    folders = (path.parent.resolve().parent, PROJECT / "recipes")
    if not any(found.is_relative_to(folder) for folder in folders):
        raise UserError(f"{place} is outside of {folders[0]}, the folder above this recipe's, and of {folders[1]}.")


def _read_into(settings: Settings, path: Path, kind: str, *, extends: bool = False) -> None:
    data = read_toml(path)
    base = data.pop("extends", None)
    if base is not None:
        if kind != "recipe" or not extends:
            reason = "a base recipe extends nothing (one level only)" if kind == "recipe" else "only recipes do"
            raise UserError(f"{path}: extends = {short_repr(base)}: {reason}.")
        _check_base(path, base)
        try:
            _read_into(settings, path.parent / base, kind)
        except UserError as error:
            raise UserError(f"{path}: extends = '{base}': {error}") from None
    for table, key, value in entries(data):
        owner = "recipe" if is_recipe_key(table, key) else "train config"
        if owner != kind:
            place = f"[{table}] {key}" if table else key
            settings.misplaced.append(
                f"{path}: {place} belongs to a {owner}, not to a {kind}. A recipe says what is trained, a train "
                "config where and how it runs."
            )
        settings.add(table, key, value, path)


def read_settings(recipe: Path, train_config: Path | None) -> Settings:
    """Merge a recipe, its base and a train config into checked tables, without building anything.

    Args:
        recipe: a recipe, or the ``resolved.toml`` of a run, which holds everything.
        train_config: a train config; None for a resolved recipe.

    Raises:
        UserError: for anything wrong in a file that can be seen without TorchTitan.
    """
    settings = Settings()
    head = read_toml(recipe)
    if head.get("resolved") is True:
        if train_config is not None:
            raise UserError(f"{recipe} is the resolved recipe of a run and needs no train config.")
        del head["resolved"]
        for table, key, value in entries(head):
            settings.add(table, key, value, recipe)
        _check_complete(settings, recipe)
        return settings
    if train_config is None:
        raise UserError(f"{recipe} needs a train config, for example train_configs/cpu.toml.")
    settings = read_recipe(recipe)
    _read_into(settings, train_config, "train config")
    _name_run(settings, recipe)
    _find_own_files(settings.tables)
    return settings


def _find_own_files(tables: dict[str, Any]) -> None:
    """Let the paths of data and tokenizer lead into the project where the working directory has no such folder."""
    for key, value in tables.items():
        if isinstance(value, dict):
            _find_own_files(value)
        elif key in _PATH_KEYS and isinstance(value, str) and value and not os.path.isabs(value):
            has_own = os.path.lexists(Path(value).parts[0])
            tables[key] = str(PROJECT / value) if not has_own and os.path.lexists(PROJECT / value) else value


def _name_run(settings: Settings, recipe: Path) -> None:
    """Put the recipe's name into ``dump_folder``, so that two variants on one train config do not share a folder.

    Weights & Biases gets it too, with the model as the group of runs to compare.
    """
    name, model = f"{recipe.resolve().parent.name}/{recipe.stem}", settings.tables["model"]
    folder = settings.tables.get("", {}).get("dump_folder")
    if isinstance(folder, str):
        settings.tables[""]["dump_folder"] = folder.replace("{recipe}", name)
    metrics = settings.tables.setdefault("metrics", {})
    if isinstance(metrics, dict):
        metrics.setdefault("run_name", name)
        metrics.setdefault("run_group", f"{model['family']} {model['flavor']}")


def read_recipe(recipe: Path) -> Settings:
    """Merge a recipe and its base, without a train config; UserError as `read_settings`."""
    settings = Settings()
    _read_into(settings, recipe, "recipe", extends=True)
    _check_complete(settings, recipe)
    return settings


def read_any(recipe: Path) -> Settings:
    """Merge a recipe, or the ``resolved.toml`` of a run, without a train config; UserError as `read_settings`."""
    return read_settings(recipe, None) if read_toml(recipe).get("resolved") is True else read_recipe(recipe)


def _misspelt(settings: Settings, table: str, key: str) -> str:
    """A present name near a missing key, or near its table."""
    if table in settings.tables:
        written = {key: [name for name in settings.tables[table] if not is_recipe_key(table, name)]}
    else:
        unknown = [name for name in settings.tables.get("", {}) if not is_recipe_key("", name)]
        written = {table: [name for name in settings.tables if name not in RECIPE_KEYS], "extends": unknown}
    for word, names in written.items():
        if found := difflib.get_close_matches(word, names, n=1):
            return f" Did you mean '{word}' by '{found[0]}'?"
    return ""


def _check_complete(settings: Settings, recipe: Path) -> None:
    for table, key in REQUIRED_KEYS:
        if key not in settings.tables.get(table, {}):
            raise UserError(f"{recipe}: [{table}] {key} is missing.{_misspelt(settings, table, key)}")
    optimizer = settings.tables.get("optimizer", {})
    if "lr" not in optimizer and "param_groups" not in optimizer:
        raise UserError(f"{recipe}: [optimizer] lr is missing.")


def find(name: str, folder: str) -> Path:
    """A recipe or train config by path or by short name (``debug/nitp_debug``, ``cpu``).

    Looks from the working directory first, then in the project. The returned path may
    not exist; `read_toml` says so then.
    """
    path = Path(name)
    if path.suffix == ".toml":
        # A link that leads nowhere is there: the project's file would not be the one that is meant.
        return path if os.path.lexists(path) or not (PROJECT / path).exists() else PROJECT / path
    relative = Path(folder) / f"{name}.toml"
    return relative if relative.exists() else PROJECT / relative


def locate(name: str) -> tuple[Path, Path | None]:
    """Files of ``<recipe>[@<train config>]``; a resolved recipe has no train config."""
    recipe_name, _, train_config_name = name.partition("@")
    recipe_path = find(recipe_name, "recipes")
    train_config_path = None
    if train_config_name:
        train_config_path = find(train_config_name, "train_configs")
    elif read_toml(recipe_path).get("resolved") is not True:
        train_config_path = default_train_config()
    return recipe_path, train_config_path


def available(folder: str) -> list[str]:
    """Short names of the project's recipes or train configs."""
    root = PROJECT / folder
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.toml"))


def default_train_config() -> Path:
    """``gpu`` where there is one, else ``cpu``."""
    # Listing and comparing recipes needs no torch, which takes seconds.
    import torch

    return find("gpu" if torch.accelerator.is_available() else "cpu", "train_configs")
