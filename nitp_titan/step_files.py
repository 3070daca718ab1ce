"""Metrics as JSON lines, one step per line. Imports no torch, so that reports start fast."""

import io
import json
import os
from pathlib import Path
from typing import Any, Literal, TextIO

from nitp_titan.errors import at
from nitp_titan.files import free_path, write_atomically

STEP_FILES = ("metrics", "validation", "geometry", "validation_geometry", "skipped")
"""Files of a run folder with a line per step; each is ``<name>.jsonl``."""


class StepFile:
    """Appends one JSON object per step, each step once.

    A file that is not resumed starts anew: a run folder holds one run (`run_folder`), whose steps run again.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stream: TextIO | None = None

    def resume(self, step: int) -> None:
        """Continue the file after ``step``; later lines are of steps that will be run again."""
        if not self.path.exists():
            return
        parsed, _ = _parsed(self.path.read_bytes())
        write_atomically(self.path, "".join(line for record, line in parsed if record["step"] <= step))
        self._stream = self._open("a")

    def append(self, record: dict[str, float]) -> None:
        if self._stream is None:
            self._stream = self._open("w")
        with at(self.path):
            self._stream.write(json.dumps(record) + "\n")
            self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _open(self, mode: Literal["a", "w"]) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.open(mode)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file; what a crash cut short or damaged is left out."""
    return [record for record, _ in _parsed(path.read_bytes())[0]]


def last_step(path: Path) -> int:
    """The last step of a metrics file; 0 if there is no such file, or no step in it."""
    return max((record["step"] for record in read_records(path)), default=0) if path.is_file() else 0


def later_lines(path: Path, step: int) -> str:
    """Lines of a metrics file that are of later steps; empty if there is no such file."""
    parsed = _parsed(path.read_bytes())[0] if path.is_file() else []
    return "".join(line for record, line in parsed if record["step"] > step)


def set_damaged_aside(path: Path, *, with_step: bool = True) -> Path | None:
    """Move lines that are not JSON objects out of a file of JSON lines, into ``<path>.damaged`` beside it.

    A last line that a crash cut short is dropped.

    Args:
        with_step: whether every line must have a ``step``, as those of metrics do.

    Returns:
        Where the damaged part is now; None if nothing was damaged.

    Raises:
        OSError: if the file cannot be read or written.
    """
    if not os.path.lexists(path):
        return None
    aside = free_path(path.with_name(f"{path.name}.damaged"))
    if not path.is_file():
        return path.rename(aside)
    parsed, damaged = _parsed(path.read_bytes(), with_step=with_step)
    if not damaged:
        return None
    aside.write_bytes(b"".join(damaged))
    write_atomically(path, "".join(line for _, line in parsed))
    return aside


def _parsed(content: bytes, *, with_step: bool = True) -> tuple[list[tuple[dict[str, Any], str]], list[bytes]]:
    """Records with their lines, and the damaged lines; a last line that was cut short is in neither."""
    parsed, damaged = [], []
    for line in io.BytesIO(content):
        try:
            text = line.decode("utf-8")
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        whole = isinstance(record, dict) and (type(record.get("step")) is int or not with_step)
        if whole and text.endswith("\n"):
            parsed.append((record, text))
        elif line.endswith(b"\n"):
            damaged.append(line)
    return parsed, damaged
