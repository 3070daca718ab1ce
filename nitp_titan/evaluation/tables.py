"""The comparison: results.json, and the same as Markdown."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from nitp_titan import markdown
from nitp_titan.difference import Difference
from nitp_titan.evaluation import scores
from nitp_titan.evaluation.plan import Average, Plan, Row
from nitp_titan.evaluation.pretrained import Model
from nitp_titan.evaluation.run import EvaluationSettings, Results
from nitp_titan.files import write_atomically

# Metrics in units of their own; all others are shares, shown in percent as in the paper.
_RAW = {"cross_entropy", "perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity"}
_LOWER_IS_BETTER = " ↓"


@dataclass(frozen=True)
class Cell:
    """A model's score in a row. Without documents ``size`` is None, without a baseline's score ``difference`` is."""

    value: float
    stderr: float | None
    size: int | None
    difference: Difference | None = None


@dataclass(frozen=True)
class Line:
    """A row with its scores by model; models without a score are left out.

    Args:
        ran: benchmarks that an average is made from; 1 for a single benchmark.
        of: benchmarks that belong to the average.
        better: number of benchmarks in which a model is better than the baseline, by model.
    """

    row: Row
    higher_is_better: bool
    cells: dict[str, Cell]
    ran: int = 1
    of: int = 1
    better: dict[str, int] | None = None


class Comparison:
    """All rows of a plan, for models of which the first is the baseline."""

    def __init__(self, models: Sequence[Model], plan: Plan, settings: EvaluationSettings, results: Results):
        self.models, self.plan, self.settings, self.results = models, plan, settings, results
        self.lines = [line for row in plan.rows if (line := self._line(row)).cells]
        self.averages = [line for average in plan.averages if (line := self._average(average)) is not None]

    @property
    def baseline(self) -> Model:
        return self.models[0]

    def _line(self, row: Row) -> Line:
        by_model = {}
        for model in self.models:
            done = self.results.scores[model.name]
            if all(row.metric in done.get(task, {}) for task in row.tasks):
                by_model[model.name] = [done[task][row.metric] for task in row.tasks]
        cells = {}
        for name, parts in by_model.items():
            value, stderr = scores.pooled(*zip(*((part.value, part.stderr, part.size) for part in parts)))
            first = by_model.get(self.baseline.name)
            change = _difference(parts, first) if first and name != self.baseline.name else None
            cells[name] = Cell(value, stderr, sum(part.size for part in parts), change)
        higher = all(part.higher_is_better for parts in by_model.values() for part in parts)
        return Line(row, higher, cells)

    def _average(self, average: Average) -> Line | None:
        """Mean of the first metric of those benchmarks that every model has."""
        first = {line.row.name: line for line in reversed(self.lines) if line.row.section == average.section}
        lines = [first[name] for name in average.rows if name in first and len(first[name].cells) == len(self.models)]
        if len(lines) < 2:
            return None
        cells, better = {}, {}
        for model in self.models:
            parts = [line.cells[model.name] for line in lines]
            value, stderr = scores.mean([part.value for part in parts], [part.stderr for part in parts])
            difference = None
            if model is not self.baseline:
                changes = [part.difference for part in parts]
                mean = scores.mean([change.value for change in changes], [change.stderr for change in changes])
                difference = scores.combined(changes, *mean)
                better[model.name] = sum(change.value > 0 for change in changes)
            cells[model.name] = Cell(value, stderr, None, difference)
        row = Row(average.section, average.name, "", "", tuple(line.row.name for line in lines))
        return Line(row, True, cells, len(lines), len(average.rows), better)

    def as_json(self) -> dict:
        """The comparison as JSON values; scores are in their metrics' units, shares from 0 to 1."""
        return {
            "models": [vars(model) | {"fingerprint": self.results.fingerprints[model.name]} for model in self.models],
            "baseline": self.baseline.name,
            "settings": {key: value for key, value in vars(self.settings).items() if key != "out"},
            "versions": self._versions(),
            "rows": [_as_json(line) for line in self.lines],
            "averages": [_as_json(line) for line in self.averages],
            "not_run": [{"name": name, "reason": reason} for name, reason in self._not_run()],
            "notes": self.plan.notes,
        }

    def _versions(self) -> dict[str, str]:
        return {name: version(name) for name in dict.fromkeys([*self.plan.versions, "transformers", "torch"])}

    def _not_run(self) -> list[tuple[str, str]]:
        failures = [(f"{task} of {model}", reason) for (model, task), reason in self.results.failures.items()]
        return [*self.plan.missing, *failures]

    def markdown(self) -> str:
        """The tables, the benchmarks that were not run, and notes on how to read them."""
        parts = []
        for section in dict.fromkeys(row.section for row in self.plan.rows):
            lines = [line for line in (*self.lines, *self.averages) if line.row.section == section]
            if lines:
                parts.append(f"### {section}\n\n{self._table(lines)}")
        if self._not_run():
            parts.append("Not run:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in self._not_run()))
        parts.append("\n".join(f"- {note}" for note in self._notes()))
        return "\n\n".join(parts) + "\n"

    def _notes(self) -> list[str]:
        names = ", ".join(f"{model.name} is {model.source}" for model in self.models)
        used = ", ".join(f"{name} {number}" for name, number in self._versions().items())
        notes = [f"{names}.", *self.plan.notes]
        if len(self.models) > 1:
            notes.append(
                f"Differences are to {self.baseline.name}. Their standard errors are paired, over the same documents, "
                "except those marked *, which take the two scores as independent."
            )
        device = f"{self.settings.dtype} on {self.settings.device}"
        return [*notes, f"Shares are in percent, ± is the standard error. {device}; {used}."]

    def _table(self, lines: list[Line]) -> str:
        others = [model.name for model in self.models[1:]]
        header = ["benchmark", "metric", "setting", "documents", *(model.name for model in self.models)]
        header += [f"{name} - {self.baseline.name}" for name in others]
        rows = [self._row(line, others) for line in lines]
        return markdown.table(header, rows, "lll" + "r" * (len(header) - 3))

    def _row(self, line: Line, others: list[str]) -> list[str]:
        size = max(cell.size or 0 for cell in line.cells.values())
        metric = line.row.metric.replace("_", " ") + ("" if line.higher_is_better else _LOWER_IS_BETTER)
        setting = line.row.setting
        if line.of > 1:
            setting = f"{line.ran} of {line.of} benchmarks" + "".join(
                f", {name} better in {count}" for name, count in line.better.items()
            )
        values = [_score_text(line, line.cells.get(model.name)) for model in self.models]
        changes = [_difference_text(line, line.cells.get(name)) for name in others]
        return [line.row.name, metric, setting, f"{size:,}" if size > 1 else "-", *values, *changes]

    def write(self, out: Path) -> None:
        """Write ``results.json`` and ``results.md``."""
        write_atomically(out / "results.json", json.dumps(self.as_json(), indent=2) + "\n")
        write_atomically(out / "results.md", self.markdown())


def _difference(parts: list[scores.Score], baseline: list[scores.Score]) -> Difference | None:
    changes = [scores.difference(part, reference) for part, reference in zip(parts, baseline, strict=True)]
    if None in changes:
        return None
    sizes = [part.size for part in parts]
    return scores.combined(
        changes, *scores.pooled([change.value for change in changes], [change.stderr for change in changes], sizes)
    )


def _as_json(line: Line) -> dict:
    cells = []
    for name, cell in line.cells.items():
        record = {"model": name, "value": cell.value, "stderr": cell.stderr, "documents": cell.size}
        if (change := cell.difference) is not None:
            record["difference"] = {"value": change.value, "stderr": change.stderr, "paired": change.pairs > 0}
        cells.append(record)
    fields = vars(line.row) | {"higher_is_better": line.higher_is_better, "scores": cells}
    return fields | ({"ran": line.ran, "of": line.of, "better": line.better} if line.of > 1 else {})


def _score_text(line: Line, cell: Cell | None) -> str:
    return "-" if cell is None else _number(line, cell.value, cell.stderr, "")


def _difference_text(line: Line, cell: Cell | None) -> str:
    if cell is None or cell.difference is None:
        return "-"
    mark = "" if cell.difference.pairs or cell.difference.stderr is None else " *"
    return _number(line, cell.difference.value, cell.difference.stderr, "+") + mark


def _format(line: Line) -> str:
    largest = max(cell.value for cell in line.cells.values())
    return ".4f" if largest < 100 else ".1f" if largest < 1e4 else ".3g"


def _number(line: Line, value: float, stderr: float | None, sign: str) -> str:
    factor, spec = (1, _format(line)) if line.row.metric in _RAW else (100, ".2f")
    error = "" if stderr is None else f" ± {factor * stderr:{spec}}"
    return f"{factor * value:{sign}z{spec}}{error}"
