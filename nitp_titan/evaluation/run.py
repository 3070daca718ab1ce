"""Run what a plan asks for and the result store does not hold yet, one model at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nitp_titan.errors import UserError
from nitp_titan.evaluation.models import check_hub, fingerprint, LoadedModel
from nitp_titan.evaluation.plan import Plan, Task
from nitp_titan.evaluation.pretrained import load_pretrained, Model, without_bos
from nitp_titan.evaluation.scores import Score
from nitp_titan.evaluation.store import ResultStore
from nitp_titan.progress import Progress


@dataclass(frozen=True)
class EvaluationSettings:
    """How models are run.

    Args:
        out: folder of the results.
        dtype: the weights' type, a key of `export.dtypes.DTYPES`.
        device: as torch names it.
        batch_size: sequences at a time.
    """

    out: Path
    dtype: str
    device: str
    batch_size: int


@dataclass(frozen=True)
class Results:
    """Scores by model, task and metric; failures by model and task, with the reason; identities of the models."""

    fingerprints: dict[str, str]
    scores: dict[str, dict[str, dict[str, Score]]]
    failures: dict[tuple[str, str], str]


def evaluate(models: Sequence[Model], plan: Plan, settings: EvaluationSettings) -> Results:
    """Scores of every model on every task; each is kept as soon as it is there, and not run again.

    A task that cannot be run is a failure of the `Results`, and the others go on.

    Raises:
        UserError: if a model does not load, ``settings.out`` cannot be written, or a task needs the hub and it does
            not answer.
    """
    store = ResultStore(settings.out)
    fingerprints = {model.name: fingerprint(model.source) for model in models}
    scores, failures, left = {}, {}, {}
    for model in models:
        identity = {"model": fingerprints[model.name], "dtype": settings.dtype}
        keys = {task.name: {**identity, "task": task.settings} for task in plan.tasks}
        found = {task.name: store.load(model.name, task.name, keys[task.name]) for task in plan.tasks}
        scores[model.name] = {name: kept for name, kept in found.items() if kept is not None}
        left[model.name] = [(task, keys[task.name]) for task in plan.tasks if found[task.name] is None]
    if any(task.online for tasks in left.values() for task, _ in tasks):
        check_hub()
    progress = Progress(sum(map(len, left.values())))
    if kept := sum(map(len, scores.values())):
        print(f"{kept} results are there already, {progress.total} to run", flush=True)
    for model in models:
        if not left[model.name]:
            continue
        loaded = _load(model, settings)
        for task, key in left[model.name]:
            try:
                made = _run(task, loaded)
                store.save(model.name, task.name, key, made)
                scores[model.name][task.name] = made
            except UserError as error:
                failures[model.name, task.name] = str(error)
            progress.add()
            failure = failures.get((model.name, task.name))
            outcome = f" was not run: {failure}" if failure else ""
            print(f"{model.name}: {task.name}{outcome} ({progress})", flush=True)
        # Two models need not fit into memory at once.
        del loaded
    return Results(fingerprints, scores, failures)


def _load(model: Model, settings: EvaluationSettings) -> LoadedModel:
    network, tokenizer = load_pretrained(model.source, dtype=settings.dtype, device=settings.device)
    for line in without_bos(tokenizer, "prompts"):
        print(f"warning: {model.name}: {line}")
    return LoadedModel(model.source, network, tokenizer, settings.batch_size)


def _run(task: Task, loaded: LoadedModel) -> dict[str, Score]:
    try:
        return task.run(loaded)
    except torch.OutOfMemoryError:
        raise UserError(f"too little device memory for --batch-size {loaded.batch_size}.") from None
