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
from torchtitan.trainer import Trainer

from nitp_titan.config.constraints import OPTIMIZER_CONSTRAINTS
from nitp_titan.config.recipe import Settings
from nitp_titan.config.refusals import upstream_refusals
from nitp_titan.config.tables import default_of
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.tokenizer import CachedTokenizer
from nitp_titan.errors import did_you_mean, nearest_choice, short_repr, UserError
from nitp_titan.models import build_model_spec
from nitp_titan.models.settings import ModelConfig

# Larger integers are no float.
_FLOAT_BITS = 1024
# How None is written in TOML, which has no null.
_NONE = "none"
_TOP_KEYS = ("hf_assets_path", "dump_folder")
# What to do at one start, and no settings of the run.
_FLAGS = ("resume", "overwrite")
_AC_MODES = {"none": None, "selective": SelectiveAC, "full": FullAC, "memory_budget": MemoryBudgetAC}


def build_trainer_config(settings: Settings, config_class: type[Trainer.Config]) -> Trainer.Config:
    """The trainer config of merged tables.

    Args:
        config_class: ``NITPTrainer.Config``, which lies in a room above.

    Raises:
        UserError: naming the file, table, key and value, and what is allowed.
    """
    try:
        model = _filled(settings, "model", ModelConfig(), settings.tables["model"])
        spec = build_model_spec(model)
        sections = {name: _section(settings, name, default) for name, default in _defaults(spec, config_class).items()}
        sections["model"] = model
        unknown = sorted(set(settings.tables) - set(sections) - {""})
        if unknown:
            place = settings.location(unknown[0])
            raise UserError(f"{place}there is no table [{unknown[0]}].{nearest_choice(unknown[0], list(sections))}")
        sections |= _top_keys(settings, config_class, known=[*sections, *_TOP_KEYS])
        if settings.misplaced:
            raise UserError(settings.misplaced[0])
        with upstream_refusals():
            return config_class(model_spec=spec, **sections)
    except UserError as error:
        # Checks inside the configs know the setting and not the file; it is added here.
        place = settings.location(error.table, error.key) if error.table is not None else ""
        raise UserError(place + str(error)) from None


def _defaults(spec: ModelSpec, config_class: type[Trainer.Config]) -> dict[str, Any]:
    """Default of every section but the model, with the components that this project chooses."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    cross_entropy = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    chosen = {
        "loss": ChunkedLossWrapper.Config(loss_fn=cross_entropy),
        "dataloader": TextDataLoader.Config(),
        "validator": dataclasses.replace(
            default_of(fields["validator"]), dataloader=TextDataLoader.Config(infinite=False), steps=10
        ),
        "tokenizer": CachedTokenizer.Config(),
    }
    elsewhere = ("model", "model_spec", *_TOP_KEYS, *_FLAGS)
    return {name: chosen.get(name) or default_of(field) for name, field in fields.items() if name not in elsewhere}


def _section(settings: Settings, name: str, default: Any) -> Any:
    table = settings.tables.get(name, {})
    special = {"optimizer": _optimizer, "activation_checkpoint": _activation_checkpoint}
    return special[name](settings, table) if name in special else _filled(settings, name, default, table)


def _top_keys(settings: Settings, config_class: type[Trainer.Config], known: list[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    values = settings.tables.get("", {})
    for key, value in values.items():
        if key in known and key not in _TOP_KEYS:
            raise UserError(f"{settings.location('', key)}[{key}] must be a table, not {short_repr(value)}.")
        if key not in _TOP_KEYS:
            raise UserError(f"{settings.location('', key)}there is no key '{key}'.{nearest_choice(key, known)}")
    return {key: _converted(value, hints[key], settings.location("", key) + key) for key, value in values.items()}


def _optimizer(settings: Settings, table: dict[str, Any]) -> OptimizersContainer.Config:
    adamw = {key: value for key, value in table.items() if key in OPTIMIZER_CONSTRAINTS}
    if adamw and "param_groups" in table:
        raise UserError(
            f"{settings.location('optimizer', 'param_groups')}[optimizer] has both param_groups and "
            f"{', '.join(adamw)}; give each group its own optimizer_kwargs instead."
        )
    hints = {"lr": float, "eps": float, "weight_decay": float, "betas": list[float]}
    adamw = {
        key: _converted(value, hints[key], f"{settings.location('optimizer', key)}[optimizer] {key}")
        for key, value in adamw.items()
    }
    default = default_adamw(**adamw) if adamw else OptimizersContainer.Config()
    others = {key: value for key, value in table.items() if key not in adamw}
    optimizer = _filled(settings, "optimizer", default, others, also=list(OPTIMIZER_CONSTRAINTS))
    for group in optimizer.param_groups:
        # TOML has lists only; torch.optim's betas are a tuple.
        for name, value in group.optimizer_kwargs.items():
            group.optimizer_kwargs[name] = tuple(value) if isinstance(value, list) else value
    return optimizer


def _activation_checkpoint(settings: Settings, table: dict[str, Any]) -> Any:
    mode = table.get("mode", "selective")
    options = {key: value for key, value in table.items() if key != "mode"}
    if not isinstance(mode, str) or mode not in _AC_MODES:
        place = f"{settings.location('activation_checkpoint', 'mode')}[activation_checkpoint] mode"
        choices = ", ".join(map(repr, _AC_MODES))
        raise UserError(
            f"{place} = {short_repr(mode)}, but it must be one of {choices}.{did_you_mean(str(mode), [*_AC_MODES])}"
        )
    if _AC_MODES[mode] is not None:
        return _filled(settings, "activation_checkpoint", _AC_MODES[mode].Config(), options, also=["mode"])
    if options:
        place = settings.location("activation_checkpoint")
        raise UserError(f"{place}[activation_checkpoint] {next(iter(options))} has no meaning with mode = 'none'.")
    return None


def _filled(settings: Settings, name: str, default: Any, table: Any, also: list[str] | None = None) -> Any:
    """Copy of the dataclass ``default`` with the values of a TOML table, nested tables included."""
    top = name.split(".")[0]
    if not isinstance(table, dict):
        raise UserError(f"{settings.location(top)}[{name}] must be a table, not {short_repr(table)}.")
    hints = typing.get_type_hints(type(default), include_extras=False)
    fields = {field.name for field in dataclasses.fields(default) if not field.name.startswith("_")}
    changes = {}
    for key, value in table.items():
        place = f"{settings.location(top, key)}[{name}]"
        if key not in fields:
            raise UserError(f"{place} has no key '{key}'.{nearest_choice(key, sorted(fields | set(also or [])))}")
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
        raise UserError(f"{settings.location(top)}[{name}] {error}") from None


def _converted(value: Any, hint: Any, place: str) -> Any:
    """``value`` as the type ``hint``, or UserError with the value and what is allowed."""
    origin = get_origin(hint)
    if origin is typing.Annotated:
        return _converted(value, get_args(hint)[0], place)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if type(None) in get_args(hint) and value == _NONE:
            return None
        options = [option for option in get_args(hint) if option is not type(None)]
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
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _record(value, hint, place)
    suggestion = did_you_mean(str(value), [str(choice) for choice in get_args(hint)]) if origin is Literal else ""
    raise UserError(f"{place} = {short_repr(value)}, but it must be {_type_name(hint)}.{suggestion}")


def _record(value: dict[str, Any], cls: type, place: str) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = [key for key in value if key not in hints]
    if unknown:
        raise UserError(f"{place} has no key '{unknown[0]}'.{nearest_choice(unknown[0], sorted(hints))}")
    fields = {key: _converted(entry, hints[key], f"{place}.{key}") for key, entry in value.items()}
    try:
        return cls(**fields)
    except TypeError as error:
        raise UserError(f"{place}: {error}") from None


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


def tables_of(config) -> dict[str, Any]:
    """Tables from which `build_trainer_config` makes the same config again; None is written as "none"."""
    document: dict[str, Any] = {"hf_assets_path": config.hf_assets_path, "dump_folder": config.dump_folder}
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if field.name in ("model_spec", *_TOP_KEYS, *_FLAGS):
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
    modes = {owner and owner.Config: mode for mode, owner in _AC_MODES.items()}
    return {"mode": modes[policy and type(policy)], **(_plain(policy) if policy else {})}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return _NONE if value is None else value
