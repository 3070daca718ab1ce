"""What an evaluation consists of: tasks that are run once per model, and the rows of the table made from them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from nitp_titan.evaluation.models import LoadedModel
from nitp_titan.evaluation.scores import Score


@dataclass(frozen=True)
class Task:
    """A task that is run, and resumed, as a whole.

    Args:
        name: its name in the result store.
        settings: whatever, besides the model, decides its scores; JSON values.
        run: scores of a model by metric; raises UserError if the task cannot be run.
        online: whether its data come from the Hugging Face hub.
    """

    name: str
    settings: dict
    run: Callable[[LoadedModel], dict[str, Score]]
    online: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the table: one metric of a benchmark.

    Args:
        section: suite that it belongs to.
        name: the benchmark.
        metric: key of the tasks' scores.
        setting: how it is run, for the reader.
        tasks: names of its tasks; of several the scores are pooled by documents.
    """

    section: str
    name: str
    metric: str
    setting: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Average:
    """Mean over benchmarks, of those that every model has.

    Args:
        section: suite that it belongs to.
        name: what the table calls it.
        rows: names of the rows that belong to it; some may not exist.
    """

    section: str
    name: str
    rows: tuple[str, ...]


@dataclass
class Plan:
    """Everything that the given suites and texts ask for.

    Args:
        missing: benchmarks that cannot be run, with the reason.
        notes: what a reader of the table must know.
        versions: packages that the numbers depend on.
    """

    tasks: list[Task] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)

    def __add__(self, other: "Plan") -> "Plan":
        return Plan(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))
