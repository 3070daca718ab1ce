"""Tables of settings to a trainer config and back, checked against TorchTitan's own config classes.

Every section is filled field by field from the types of its dataclass, so every setting of
TorchTitan is reachable and a wrong one is named. Knows no TOML: `recipe` reads the files.
"""

import dataclasses
import types
import typing
from typing import Any, get_args, get_origin, Literal

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw, OptimizersContainer
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.config.constraints import OPTIMIZER_RANGES
from nitp_titan.config.recipe import Settings
from nitp_titan.config.sections import ModelConfig
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.tokenizer import CachedTokenizer
from nitp_titan.errors import (
    nearest,
    shown,
    upstream_refusals,
    UserError,
)
from nitp_titan.models import build_model_spec
from nitp_titan.training.trainer import NITPTrainer
from nitp_titan.training.validator import ProbingValidator

# Larger integers are no float.
_FLOAT_BITS = 1024
# How None is written in TOML, which has no null.
NONE = "none"
TOP_KEYS = ("hf_assets_path", "dump_folder")
# What to do at one start: flags, and no settings of the run.
_FLAGS = ("resume", "overwrite")
AC_MODES = {"none": None, "selective": SelectiveAC, "full": FullAC, "memory_budget": MemoryBudgetAC}


def build(settings: Settings) -> NITPTrainer.Config:
    """The trainer config of merged tables.

    Raises:
        UserError: naming the file, table, key and value, and what is allowed.
    """
    try:
        model = _filled(settings, "model", ModelConfig(), settings.tables["model"])
        spec = build_model_spec(model)
        sections = {name: _section(settings, name, default) for name, default in _defaults(spec).items()}
        sections["model"] = model
        unknown = sorted(set(settings.tables) - set(sections) - {""})
        if unknown:
            place = settings.place(unknown[0])
            raise UserError(f"{place}there is no table [{unknown[0]}].{nearest(unknown[0], list(sections))}")
        sections |= _top_keys(settings, known=[*sections, *TOP_KEYS])
        if settings.misplaced:
            raise UserError(settings.misplaced[0])
        return _config(model_spec=spec, **sections)
    except UserError as error:
        # Checks inside the configs know the setting and not the file; it is added here.
        place = settings.place(error.table, error.key) if error.table is not None else ""
        raise UserError(place + str(error)) from None


def _config(**sections: Any) -> NITPTrainer.Config:
    with upstream_refusals():
        return NITPTrainer.Config(**sections)


def _defaults(spec: ModelSpec) -> dict[str, Any]:
    """Default of every section but the model, with the components that this project chooses."""
    cross_entropy = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    chosen = {
        "loss": ChunkedLossWrapper.Config(loss_fn=cross_entropy),
        "dataloader": TextDataLoader.Config(),
        "validator": ProbingValidator.Config(dataloader=TextDataLoader.Config(infinite=False), steps=10),
        "tokenizer": CachedTokenizer.Config(),
    }
    elsewhere = ("model", "model_spec", *TOP_KEYS, *_FLAGS)
    fields = [field for field in dataclasses.fields(NITPTrainer.Config) if field.name not in elsewhere]
    return {field.name: chosen.get(field.name) or field.default_factory() for field in fields}


def _section(settings: Settings, name: str, default: Any) -> Any:
    table = settings.tables.get(name, {})
    special = {"optimizer": _optimizer, "activation_checkpoint": _activation_checkpoint}
    return special[name](settings, table) if name in special else _filled(settings, name, default, table)


def _top_keys(settings: Settings, known: list[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(NITPTrainer.Config)
    values = settings.tables.get("", {})
    for key, value in values.items():
        if key in known and key not in TOP_KEYS:
            raise UserError(f"{settings.place('', key)}[{key}] must be a table, not {shown(value)}.")
        if key not in TOP_KEYS:
            raise UserError(f"{settings.place('', key)}there is no key '{key}'.{nearest(key, known)}")
    return {key: _converted(value, hints[key], settings.place("", key) + key) for key, value in values.items()}


def _optimizer(settings: Settings, table: dict[str, Any]) -> OptimizersContainer.Config:
    adamw = {key: value for key, value in table.items() if key in OPTIMIZER_RANGES}
    if adamw and "param_groups" in table:
        raise UserError(
            f"{settings.place('optimizer', 'param_groups')}[optimizer] has both param_groups and "
            f"{', '.join(adamw)}; give each group its own optimizer_kwargs instead."
        )
    hints = {"lr": float, "eps": float, "weight_decay": float, "betas": list[float]}
    adamw = {
        key: _converted(value, hints[key], f"{settings.place('optimizer', key)}[optimizer] {key}")
        for key, value in adamw.items()
    }
    default = default_adamw(**adamw) if adamw else OptimizersContainer.Config()
    others = {key: value for key, value in table.items() if key not in adamw}
    optimizer = _filled(settings, "optimizer", default, others, also=list(OPTIMIZER_RANGES))
    for group in optimizer.param_groups:
        # TOML has lists only; torch.optim's betas are a tuple.
        for name, value in group.optimizer_kwargs.items():
            group.optimizer_kwargs[name] = tuple(value) if isinstance(value, list) else value
    return optimizer


def _activation_checkpoint(settings: Settings, table: dict[str, Any]) -> Any:
    mode = table.get("mode", "selective")
    options = {key: value for key, value in table.items() if key != "mode"}
    if not isinstance(mode, str) or mode not in AC_MODES:
        place = f"{settings.place('activation_checkpoint', 'mode')}[activation_checkpoint] mode"
        choices = ", ".join(map(repr, AC_MODES))
        raise UserError(
            f"{place} = {shown(mode)}, but it must be one of {choices}.{_suggestion(str(mode), [*AC_MODES])}"
        )
    if AC_MODES[mode] is not None:
        return _filled(settings, "activation_checkpoint", AC_MODES[mode].Config(), options, also=["mode"])
    if options:
        place = settings.place("activation_checkpoint")
        raise UserError(f"{place}[activation_checkpoint] {next(iter(options))} has no meaning with mode = 'none'.")
    return None


def _filled(settings: Settings, name: str, default: Any, table: Any, also: list[str] | None = None) -> Any:
    """Copy of the dataclass ``default`` with the values of a TOML table, nested tables included."""
    top = name.split(".")[0]
    if not isinstance(table, dict):
        raise UserError(f"{settings.place(top)}[{name}] must be a table, not {shown(table)}.")
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
        if isinstance(value, float) or (type(value) is int and value.bit_length() < _FLOAT_BITS):
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
    suggestion = _suggestion(str(value), [str(choice) for choice in get_args(hint)]) if origin is Literal else ""
    raise UserError(f"{place} = {shown(value)}, but it must be {_type_name(hint)}.{suggestion}")


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


def _suggestion(word: str, choices: list[str]) -> str:
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


def to_tables(config) -> dict[str, Any]:
    """Tables from which `build` makes the same config again; None is written as "none"."""
    document: dict[str, Any] = {"hf_assets_path": config.hf_assets_path, "dump_folder": config.dump_folder}
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if field.name in ("model_spec", *TOP_KEYS, *_FLAGS):
            continue
        if field.name == "activation_checkpoint":
            document[field.name] = _activation_checkpoint_table(section)
        elif field.name == "loss":
            # A loss that a Python config brings has no name in TOML.
            document[field.name] = {"num_chunks": getattr(section, "num_chunks", 1)}
        else:
            document[field.name] = _plain(section)
    return document


def _activation_checkpoint_table(policy: Any) -> dict[str, Any]:
    modes = {owner and owner.Config: mode for mode, owner in AC_MODES.items()}
    return {"mode": modes[policy and type(policy)], **(_plain(policy) if policy else {})}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return NONE if value is None else value
