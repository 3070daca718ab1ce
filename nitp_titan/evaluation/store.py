"""Results on disk: a file per model and task, which is valid only for the settings that made it."""

import dataclasses
import json
import re
from pathlib import Path

from nitp_titan.evaluation.scores import Score
from nitp_titan.files import check_writable, write_atomically

# Raised when the same settings would give other numbers.
FORMAT = 1


class ResultStore:
    """Scores by model and task in ``<folder>/results/<model>/<task>.json``.

    Raises:
        UserError: if the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "results"
        check_writable(folder, f"--out {folder}")

    def path(self, model: str, task: str) -> Path:
        return self.folder / _file_name(model) / f"{_file_name(task)}.json"

    def load(self, model: str, task: str, key: dict) -> dict[str, Score] | None:
        """Scores by metric that were made with the settings ``key``; None if there are none."""
        try:
            record = json.loads(self.path(model, task).read_text(encoding="utf-8"))
            if record["key"] == _as_json({"format": FORMAT, **key}):
                return {metric: Score(**fields) for metric, fields in record["scores"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            # Missing, cut off or of another program: the task is run.
            pass
        return None

    def save(self, model: str, task: str, key: dict, scores: dict[str, Score]) -> None:
        path = self.path(model, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {metric: dataclasses.asdict(score) for metric, score in scores.items()}
        write_atomically(path, json.dumps({"key": {"format": FORMAT, **key}, "scores": fields}))


def _as_json(key: dict) -> dict:
    return json.loads(json.dumps(key))


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", name).strip("-.") or "model"
