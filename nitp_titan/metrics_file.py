"""Metrics as JSON lines, one step per line. Imports no torch, so that reports start fast."""

import json
from pathlib import Path

from nitp_titan.files import write_atomically


class MetricsFile:
    """Appends one JSON object per step, of which none stands there twice.

    A file that is not resumed starts anew: a run folder holds one run (`run_folder`), whose steps run again.
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
        self._open("a")

    def append(self, record: dict[str, float]) -> None:
        if self._stream is None:
            self._open("w")
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _open(self, mode: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open(mode)


def read_records(path: Path) -> list[dict[str, float]]:
    """Records of a metrics file; a last line that a crash cut short is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
