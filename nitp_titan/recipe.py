"""Recipes and train configs: TOML to a trainer config. The only reader of TOML.

A recipe says what is trained, a train config where and how it runs; every key belongs
to exactly one of the two. Imports torch only when a config is built.
"""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, Literal

import tomli
import tomli_w

from nitp_titan.config import ModelConfig, nearest, OPTIMIZER_RANGES, UserError

PROJECT = Path(__file__).resolve().parent.parent

# What is trained. Every other key says where and how, and belongs to a train config.
RECIPE_KEYS: dict[str, set[str] | None] = {
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
NONE = "none"


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
            raise UserError(f"{path}: extends = {base!r}, but it must be the path of a recipe beside this one.")
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
    else:
        if train_config is None:
            raise UserError(f"{recipe} needs a train config, for example train_configs/cpu.toml.")
        _read_into(settings, recipe, "recipe", extends=True)
        _read_into(settings, train_config, "train config")
    for table, key in REQUIRED_KEYS:
        if key not in settings.tables.get(table, {}):
            raise UserError(f"{recipe}: [{table}] {key} is missing.")
    optimizer = settings.tables.get("optimizer", {})
    if "lr" not in optimizer and "param_groups" not in optimizer:
        raise UserError(f"{recipe}: [optimizer] lr is missing.")
    return settings


def load(recipe: Path, train_config: Path | None):
    """Build the ``NITPTrainer.Config`` of a recipe on a train config.

    Raises:
        UserError: naming file, table, key, value and what is allowed.
    """
    return build(read_settings(recipe, train_config))


def build(settings: Settings):
    """``NITPTrainer.Config`` from merged tables; imports TorchTitan."""
    from nitp_titan.trainer import NITPTrainer

    try:
        changes = {}
        for field, default in _defaults(settings).items():
            if field in ("model", "model_spec"):
                changes[field] = default
            elif field == "optimizer":
                changes[field] = _optimizer(settings)
            elif field == "activation_checkpoint":
                changes[field] = _activation_checkpoint(settings)
            else:
                changes[field] = _filled(settings, field, default, settings.tables.get(field, {}))
        hints = typing.get_type_hints(NITPTrainer.Config, include_extras=False)
        for key, value in settings.tables.get("", {}).items():
            if key not in ("hf_assets_path", "dump_folder"):
                tables = [*changes, "hf_assets_path", "dump_folder"]
                raise UserError(f"{settings.place('', key)}there is no key '{key}'.{nearest(key, tables)}")
            changes[key] = _converted(value, hints[key], settings.place("", key) + key)
        unknown = set(settings.tables) - set(changes) - {""}
        for table in sorted(unknown):
            raise UserError(f"{settings.place(table)}there is no table [{table}].{nearest(table, list(changes))}")
        if settings.misplaced:
            raise UserError(settings.misplaced[0])
        return NITPTrainer.Config(**changes)
    except UserError as error:
        # The checks of the configs know no files; those that know the setting get its file here.
        place = settings.place(error.table, error.key) if error.table is not None else ""
        raise UserError(place + str(error)) from None


def _defaults(settings: Settings) -> dict[str, Any]:
    """Default of every section, with the components that this project chooses."""
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from torchtitan.components.validate import Validator
    from torchtitan.models.common.config_utils import decoder_vocab_size

    from nitp_titan.data import TextDataLoader
    from nitp_titan.models import build_model_spec
    from nitp_titan.trainer import NITPTrainer

    model = _filled(settings, "model", ModelConfig(), settings.tables["model"])
    spec = build_model_spec(model)
    chosen = {
        "model": model,
        "model_spec": spec,
        "loss": ChunkedLossWrapper.Config(
            loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
        ),
        "dataloader": TextDataLoader.Config(),
        "validator": Validator.Config(dataloader=TextDataLoader.Config(infinite=False), steps=10),
        "checkpoint": CheckpointManager.Config(),
        "tokenizer": HuggingFaceTokenizer.Config(),
    }
    sections = [field for field in dataclasses.fields(NITPTrainer.Config) if field.name not in ("hf_assets_path", "dump_folder")]
    return {
        field.name: chosen[field.name] if field.name in chosen else field.default_factory()
        for field in sections
    }


def _optimizer(settings: Settings):
    from torchtitan.components.optimizer import default_adamw, OptimizersContainer

    table = dict(settings.tables["optimizer"])
    adamw = {key: table.pop(key) for key in OPTIMIZER_RANGES if key in table}
    if adamw and "param_groups" in table:
        raise UserError(
            f"{settings.place('optimizer', 'param_groups')}[optimizer] has both param_groups and "
            f"{', '.join(adamw)}; give each group its own optimizer_kwargs instead."
        )
    default = OptimizersContainer.Config()
    if adamw:
        hints = {"lr": float, "eps": float, "weight_decay": float, "betas": list[float]}
        adamw = {
            key: _converted(value, hints[key], f"{settings.place('optimizer', key)}[optimizer] {key}")
            for key, value in adamw.items()
        }
        default = default_adamw(**adamw)
    optimizer = _filled(settings, "optimizer", default, table, also=list(OPTIMIZER_RANGES))
    for group in optimizer.param_groups:
        # TOML has lists only; torch.optim's betas are a tuple.
        for name, value in group.optimizer_kwargs.items():
            group.optimizer_kwargs[name] = tuple(value) if isinstance(value, list) else value
    return optimizer


def _activation_checkpoint(settings: Settings):
    from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC

    modes = {"none": None, "selective": SelectiveAC, "full": FullAC, "memory_budget": MemoryBudgetAC}
    table = dict(settings.tables.get("activation_checkpoint", {}))
    mode = table.pop("mode", "selective")
    if mode not in modes:
        raise UserError(
            f"{settings.place('activation_checkpoint', 'mode')}[activation_checkpoint] mode = {mode!r}, but it must "
            f"be one of {', '.join(map(repr, modes))}.{_hint(str(mode), list(modes))}"
        )
    if modes[mode] is None:
        if table:
            raise UserError(
                f"{settings.place('activation_checkpoint')}[activation_checkpoint] {next(iter(table))} has no "
                "meaning with mode = 'none'."
            )
        return None
    return _filled(settings, "activation_checkpoint", modes[mode].Config(), table, also=["mode"])


def _filled(settings: Settings, name: str, default: Any, table: Any, also: list[str] | None = None) -> Any:
    """Copy of the dataclass ``default`` with the values of a TOML table, nested tables included."""
    top = name.split(".")[0]
    if not isinstance(table, dict):
        raise UserError(f"{settings.place(top)}[{name}] must be a table, not {table!r}.")
    hints = typing.get_type_hints(type(default), include_extras=False)
    fields = {field.name for field in dataclasses.fields(default) if not field.name.startswith("_")}
    changes = {}
    for key, value in table.items():
        place = f"{settings.place(top, key)}[{name}]"
        if key not in fields:
            raise UserError(f"{place} has no key '{key}'.{nearest(key, sorted(fields | set(also or [])))}")
        current = getattr(default, key)
        if dataclasses.is_dataclass(current):
            changes[key] = _filled(settings, f"{name}.{key}", current, value)
            continue
        changes[key] = _converted(value, hints[key], f"{place} {key}")
    if name == "checkpoint" and changes.get("initial_load_path") and "://" not in changes["initial_load_path"]:
        changes["initial_load_path"] = os.path.abspath(changes["initial_load_path"])
    try:
        return dataclasses.replace(default, **changes)
    except UserError:
        raise
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{settings.place(top)}[{name}] {error}") from None


def _converted(value: Any, hint: Any, place: str) -> Any:
    """``value`` as the type ``hint``, or UserError with the value and what is allowed."""
    origin = get_origin(hint)
    if origin is typing.Annotated:
        return _converted(value, get_args(hint)[0], place)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        options = get_args(hint)
        if type(None) in options and value == NONE:
            return None
        options = [option for option in options if option is not type(None)]
        for option in options:
            try:
                return _converted(value, option, place)
            except UserError:
                if len(options) == 1:
                    raise
    elif origin is Literal:
        if value in get_args(hint) and type(value) in map(type, get_args(hint)):
            return value
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint in (int, str, bool):
        if type(value) is hint:
            return value
    elif origin is list or hint is list:
        if isinstance(value, list):
            (item,) = get_args(hint) or (Any,)
            return [_converted(entry, item, f"{place}[{index}]") for index, entry in enumerate(value)]
    elif origin is dict or hint is dict:
        if isinstance(value, dict):
            return value
    elif origin is tuple:
        if isinstance(value, list) and len(value) == len(get_args(hint)):
            return tuple(_converted(entry, item, place) for entry, item in zip(value, get_args(hint)))
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _record(value, hint, place)
    suggestion = _hint(str(value), [str(choice) for choice in get_args(hint)]) if origin is Literal else ""
    raise UserError(f"{place} = {value!r}, but it must be {_type_name(hint)}.{suggestion}")


def _record(value: dict[str, Any], cls: type, place: str) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = [key for key in value if key not in hints]
    if unknown:
        raise UserError(f"{place} has no key '{unknown[0]}'.{nearest(unknown[0], sorted(hints))}")
    fields = {key: _converted(entry, hints[key], f"{place}.{key}") for key, entry in value.items()}
    try:
        return cls(**fields)
    except TypeError as error:
        raise UserError(f"{place}: {error}") from None


def _hint(word: str, choices: list[str]) -> str:
    return nearest(word, choices) if "Did you mean" in nearest(word, choices) else ""


def _type_name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "'none'"}
    if hint in names:
        return names[hint]
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in get_args(hint))
    if origin is list:
        return "a list, each entry " + _type_name(get_args(hint)[0])
    return "a table" if origin is dict or hint is dict or dataclasses.is_dataclass(hint) else f"a {hint}"


# ---- the way back -------------------------------------------------------------------------------


def to_tables(config) -> dict[str, Any]:
    """Tables from which `build` makes the same config again; None is written as "none"."""
    document: dict[str, Any] = {"hf_assets_path": config.hf_assets_path, "dump_folder": config.dump_folder}
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if field.name in ("hf_assets_path", "dump_folder", "model_spec"):
            continue
        if field.name == "activation_checkpoint":
            document[field.name] = _activation_checkpoint_table(section)
        elif field.name == "loss":
            document[field.name] = {"num_chunks": section.num_chunks}
        else:
            document[field.name] = _plain(section)
    return document


def _activation_checkpoint_table(policy: Any) -> dict[str, Any]:
    if policy is None:
        return {"mode": "none"}
    mode = {"SelectiveAC": "selective", "FullAC": "full", "MemoryBudgetAC": "memory_budget"}
    return {"mode": mode[type(policy)._owner.__name__], **_plain(policy)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return NONE if value is None else value


def write_resolved(config, folder: Path) -> None:
    """Write ``resolved.toml`` (can be trained again) and ``resolved.json`` into a run folder."""
    tables = to_tables(config)
    folder.mkdir(parents=True, exist_ok=True)
    head = "# The resolved configuration of a run; torchrun ... -m nitp_titan.train --recipe <this file>\n"
    _replace(folder / "resolved.toml", head + tomli_w.dumps({"resolved": True, **tables}))
    _replace(folder / "resolved.json", json.dumps(tables, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


# ---- names --------------------------------------------------------------------------------------


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
