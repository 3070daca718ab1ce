"""Tables of settings, as TOML has them: one by one, flat by name, and how two differ. Imports no torch."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from nitp_titan.errors import changed_values

Tables = dict[str, Any]
"""``{table: {key: value}}``; keys outside of all tables stand beside the tables."""


def entries(tables: Tables) -> Iterator[tuple[str, str, Any]]:
    """(table, key, value) of every setting; the table of a key outside of all tables is empty."""
    for name, content in tables.items():
        if isinstance(content, dict):
            yield from ((name, key, value) for key, value in content.items())
        else:
            yield "", name, content


def flat(tables: Tables) -> dict[str, Any]:
    """Every single setting by its dotted name: ``training.steps``, ``optimizer.lr``."""
    found: dict[str, Any] = {}
    for table, key, value in entries(tables):
        _add_leaves(found, f"{table}.{key}" if table else key, value)
    one_group = not any("param_groups[1]" in name for name in found)
    prefix = "param_groups[0].optimizer_kwargs."
    return {name.replace(prefix, "") if one_group else name: value for name, value in found.items()}


def flat_settings(tables: Tables) -> dict[str, Any]:
    """`flat` with the names that messages give: ``[training] steps``, ``[optimizer] lr``."""
    return {_as_in_messages(name): value for name, value in flat(tables).items()}


def _as_in_messages(name: str) -> str:
    table, dot, key = name.partition(".")
    return f"[{table}] {key}" if dot else name


def _add_leaves(found: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            _add_leaves(found, f"{name}.{key}" if name else key, entry)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for index, entry in enumerate(value):
            _add_leaves(found, f"{name}[{index}]", entry)
    else:
        found[name] = value


def default_of(field: dataclasses.Field) -> Any:
    """Default of a field of a dataclass that has one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def changes(before: Tables, now: Tables) -> dict[str, list[Any]]:
    """Settings that differ, by name, as ``[before, now]``; None stands for one that is not there."""
    return changed_values(flat_settings(before), flat_settings(now))
