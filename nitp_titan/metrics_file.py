"""Metrics as JSON lines, one step per line. Imports no torch, so that reports start fast."""

import json
import logging
from pathlib import Path

from nitp_titan.files import write_atomically

logger = logging.getLogger()


class MetricsFile:
    """Appends one JSON object per step; after a resume no step stands there twice.

    A new run in a folder that has the file already keeps the old one as ``<name>.<n>``.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stream = None

    def resume(self, step: int) -> None:
        """Continue the file after ``step``; later lines are of steps that will be run again."""
        if not self.path.exists():
            return
        kept = [json.dumps(record) + "\n" for record in read_records(self.path) if record["step"] <= step]
        write_atomically(self.path, "".join(kept))
        self._open()

    def append(self, record: dict[str, float]) -> None:
        if self._stream is None:
            self._set_aside()
            self._open()
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("a")

    def _set_aside(self) -> None:
        if self.path.exists():
            number = 1
            while (old := self.path.with_name(f"{self.path.name}.{number}")).exists():
                number += 1
            self.path.rename(old)
            logger.warning(f"{self.path} was of another run; it is now {old}.")


def read_records(path: Path) -> list[dict[str, float]]:
    """Records of a metrics file; a last line that a crash cut short is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
