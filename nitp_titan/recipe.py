"""Recipes and train configs: TOML to a trainer config. The only reader of TOML.

A recipe says what is trained, a train config where and how it runs; every key belongs
to exactly one of the two. Imports torch only when a config is built.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from nitp_titan.config import nearest, UserError
from nitp_titan.files import write_atomically

PROJECT = Path(__file__).resolve().parent.parent

# What is trained. Every other key says where and how, and belongs to a train config.
RECIPE_KEYS: dict[str, set[str] | None] = {
    # The tokenizer: it gives tokens and losses their meaning.
    "": {"hf_assets_path"},
    "model": {"family", "flavor"},
    "nitp": None,
    "optimizer": {"lr", "betas", "eps", "weight_decay", "param_groups"},
    "lr_scheduler": None,
    "training": {"seq_len", "global_batch_size", "steps", "max_norm"},
    "debug": {"seed"},
}
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
        self.tables.setdefault(table, {})[key] = value
        self.origins[table, key] = origin

    def place(self, table: str | None, key: str | None = None) -> str:
        """``"file: "`` of a setting, or of its table, or nothing where no file set it."""
        if (table, key) in self.origins:
            return f"{self.origins[table, key]}: "
        files = [origin for (name, _), origin in self.origins.items() if name == table]
        return f"{files[-1]}: " if files else ""


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; UserError names the file, and the line of a mistake."""
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise UserError(f"{path} does not exist.{nearest(str(path), siblings)}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a TOML file.") from None
    except PermissionError:
        raise UserError(f"{path} cannot be read: permission denied.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start}.") from None
    except tomli.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _is_recipe_key(table: str, key: str) -> bool:
    return table in RECIPE_KEYS and (RECIPE_KEYS[table] is None or key in RECIPE_KEYS[table])


def _entries(data: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(table, key, value) of a parsed file."""
    for name, content in data.items():
        if isinstance(content, dict):
            yield from ((name, key, value) for key, value in content.items())
        else:
            yield "", name, content


def _read_into(settings: Settings, path: Path, kind: str, *, extends: bool = False) -> None:
    data = read_toml(path)
    base = data.pop("extends", None)
    if base is not None:
        if kind != "recipe" or not extends:
            reason = "a base recipe extends nothing (one level only)" if kind == "recipe" else "only recipes do"
            raise UserError(f"{path}: extends = {base!r}: {reason}.")
        if not isinstance(base, str):
            raise UserError(f"{path}: extends = {base!r}, but it must be the path of a recipe, from this one's folder.")
        try:
            _read_into(settings, path.parent / base, kind)
        except UserError as error:
            raise UserError(f"{path}: extends = '{base}': {error}") from None
    for table, key, value in _entries(data):
        owner = "recipe" if _is_recipe_key(table, key) else "train config"
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
        for table, key, value in _entries(head):
            settings.add(table, key, value, recipe)
        _check_complete(settings, recipe)
        return settings
    if train_config is None:
        raise UserError(f"{recipe} needs a train config, for example train_configs/cpu.toml.")
    settings = read_recipe(recipe)
    _read_into(settings, train_config, "train config")
    _name_run(settings, recipe)
    return settings


def _name_run(settings: Settings, recipe: Path) -> None:
    """Put the recipe's name into ``dump_folder``, so that two arms on one train config do not share a folder.

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


def _check_complete(settings: Settings, recipe: Path) -> None:
    for table, key in REQUIRED_KEYS:
        if key not in settings.tables.get(table, {}):
            raise UserError(f"{recipe}: [{table}] {key} is missing.")
    optimizer = settings.tables.get("optimizer", {})
    if "lr" not in optimizer and "param_groups" not in optimizer:
        raise UserError(f"{recipe}: [optimizer] lr is missing.")


def load(recipe: Path, train_config: Path | None):
    """Build the ``NITPTrainer.Config`` of a recipe on a train config.

    Raises:
        UserError: naming file, table, key, value and what is allowed.
    """
    from nitp_titan import schema

    return schema.build(read_settings(recipe, train_config))


def write_resolved(config, folder: Path) -> None:
    """Write ``resolved.toml`` (can be trained again) and ``resolved.json`` into a run folder."""
    from nitp_titan import schema

    tables = schema.to_tables(config)
    folder.mkdir(parents=True, exist_ok=True)
    head = "# The resolved configuration of a run; torchrun ... -m nitp_titan.train --recipe <this file>\n"
    write_atomically(folder / "resolved.toml", head + tomli_w.dumps({"resolved": True, **tables}))
    write_atomically(folder / "resolved.json", json.dumps(tables, indent=2) + "\n")


def find(name: str, folder: str) -> Path:
    """A recipe or train config by path or by short name (``debug/nitp_debug``, ``cpu``).

    Looks from the working directory first, then in the project. The returned path may
    not exist; `read_toml` says so then.
    """
    path = Path(name)
    if path.suffix == ".toml":
        return path if path.exists() or not (PROJECT / path).exists() else PROJECT / path
    relative = Path(folder) / f"{name}.toml"
    return relative if relative.exists() else PROJECT / relative


def available(folder: str) -> list[str]:
    """Short names of the project's recipes or train configs."""
    root = PROJECT / folder
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.toml"))


def default_train_config() -> Path:
    """``gpu`` where there is one, else ``cpu``."""
    import torch

    return find("gpu" if torch.accelerator.is_available() else "cpu", "train_configs")
