"""A user's mistake in one line, and what messages are made of. Imports no torch."""

import difflib
import os
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """A mistake in a recipe, a train config or a flag: one line says all, no traceback.

    Args:
        message: the place, the value and the way out.
        table, key: the setting, if it is one, so that a reader of TOML can name the file.
    """

    def __init__(self, message: str, *, table: str | None = None, key: str | None = None):
        super().__init__(message)
        self.table, self.key = table, key


@contextmanager
def at(path: str | os.PathLike) -> Iterator[None]:
    """Give an OSError its file name where it has none: a write to an open file says only that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def first_line(error: BaseException) -> str:
    """The first line of an error's message; libraries add long help, or have no message."""
    return next(iter(str(error).strip().splitlines()), "")


class _Shown(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write out an integer of thousands of digits.
        return repr(value) if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bits"


_shown = _Shown()
_shown.maxstring = _shown.maxother = 100


def short_repr(value: object) -> str:
    """``repr`` of a setting, cut where it is long: an error is one line."""
    return _shown.repr(value)


def first_few(parts: Iterable[str], most: int = 3) -> str:
    """The first few of some findings and how many more there are, as one line."""
    parts = list(parts)
    more = f"; and {len(parts) - most} more" if len(parts) > most else ""
    return "; ".join(parts[:most]) + more


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the choice closest to ``word``; empty if none is close."""
    # A mistyped letter scores above 0.6; so does a key with its words in another order.
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def nearest_choice(word: str, choices: Iterable[str]) -> str:
    """`did_you_mean`, or all choices where none is close."""
    choices = list(choices)
    return did_you_mean(word, choices) or (f" Choose from: {', '.join(sorted(choices))}." if choices else "")


def invalid(table: str, key: str, value: Any, allowed: str, choices: Iterable[str] = ()) -> UserError:
    """The error of a setting that its table does not allow.

    Args:
        table, key: the setting; table is empty for a key outside of all tables.
        allowed: what it may be, as the end of a sentence that begins with "it must be".
        choices: valid words, of which the nearest is named.
    """
    place = f"[{table}] {key}" if table else key
    words = [word for word in (value if isinstance(value, list) else [value]) if word not in choices]
    near = did_you_mean(str(words[0]), choices) if words else ""
    return UserError(f"{place} = {short_repr(value)}, but it must be {allowed}.{near}", table=table, key=key)


def changed_values(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """Entries that differ, as ``[old, new]``; None stands for one that is not there."""
    names = [*old, *(name for name in new if name not in old)]
    return {name: [old.get(name), new.get(name)] for name in names if old.get(name) != new.get(name)}


def setting_repr(value: Any) -> str:
    """A setting's value in a message; None is one that is not there."""
    return "not set" if value is None else short_repr(value)


def changes_text(changed: dict[str, list[Any]]) -> str:
    """The first few entries that differ, from `changed_values`, as one line."""
    return first_few(f"{name}: {setting_repr(old)} -> {setting_repr(new)}" for name, (old, new) in changed.items())
