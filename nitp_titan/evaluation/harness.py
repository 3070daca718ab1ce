"""Suites of lm-evaluation-harness: each of its tasks is run by itself and kept, groups are pooled from them.

The harness' own cache of requests (`use_cache`) stays off: it is keyed by the prompt and not by the model, and writes a
database row per request. A task's result file loses at most that task, and is valid for one model and setting only.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TYPE_CHECKING

from nitp_titan.data.hub import without_download_counts
from nitp_titan.errors import nearest_choice, UserError
from nitp_titan.evaluation import local_suite, suites
from nitp_titan.evaluation.models import LoadedModel
from nitp_titan.evaluation.plan import (
    Average,
    Plan,
    Row,
    Task,
)
from nitp_titan.evaluation.pretrained import require
from nitp_titan.evaluation.scores import ratio, Score
from nitp_titan.evaluation.suites import Benchmark
from nitp_titan.machine.failures import explained

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SEED = 1234
# For metrics without a closed form only; the paper's benchmarks have one.
_BOOTSTRAPS = 1000


def plan(suite: str, names: Sequence[str], *, limit: int | None, local_folder: Path) -> Plan:
    """Tasks and rows of the suite ``paper``, ``quick`` or ``local``.

    Args:
        names: benchmarks or harness tasks of the suite to run; all if empty.
        limit: documents per task of the harness.
        local_folder: where the local suite is.

    Raises:
        UserError: if a name is not in the suite, or the local suite cannot be made.
    """
    # The harness' adapter to transformers imports accelerate, which it does not depend on.
    for package in ("lm_eval", "accelerate"):
        require(package)
    benchmarks = choose(suites.BENCHMARKS[suite], names, suite)
    data = local_suite.ensure(local_folder) if suite == "local" else None
    folder = local_folder if suite == "local" else None
    made = Plan(versions=["lm_eval"])
    for benchmark in benchmarks:
        if benchmark.task is None:
            made.missing.append((benchmark.name, benchmark.missing))
            continue
        tasks = leaves(benchmark.task, folder)
        made.tasks += [_task(task, benchmark, limit=limit, folder=folder, data=data) for task in tasks]
        setting = f"{benchmark.num_fewshot}-shot"
        made.rows += [Row(suite, benchmark.name, metric, setting, tuple(tasks)) for metric in benchmark.metrics]
    if suite != "local":
        made.averages += _averages(suite)
        made.notes += [_settings(benchmarks), "An average over a part of the benchmarks is not the paper's average."]
    if limit is not None:
        made.notes.append(f"LIMITED to the first {limit} documents of every harness task: not a result to report.")
    return made


def choose(benchmarks: Sequence[Benchmark], names: Sequence[str], suite: str) -> list[Benchmark]:
    """Benchmarks of these names, theirs or the harness'; UserError with the nearest name for an unknown one."""
    known = {name: bench for bench in benchmarks for name in (bench.name, bench.task) if name}
    for name in names:
        if name not in known:
            raise UserError(f"--tasks {name}: the suite '{suite}' has no such task.{nearest_choice(name, [*known])}")
    return [bench for bench in benchmarks if not names or {bench.name, bench.task} & set(names)]


def _averages(suite: str) -> list[Average]:
    if suite == "quick":
        return [Average(suite, "average", tuple(bench.name for bench in suites.QUICK))]
    return [
        Average(suite, "average of the paper's 13", tuple(bench.name for bench in suites.PAPER)),
        Average(suite, "average of its dense models' 7", suites.DENSE),
        Average(suite, "average of its ablations' 5", suites.ABLATIONS),
    ]


def _settings(benchmarks: Sequence[Benchmark]) -> str:
    by_source: dict[str, list[str]] = {}
    for bench in benchmarks:
        if bench.task:
            by_source.setdefault(bench.source, []).append(f"{bench.name} ({bench.num_fewshot})")
    chosen = "; ".join(f"{source}: {', '.join(names)}" for source, names in by_source.items())
    return f"The paper names no numbers of examples, prompts or metrics. Examples are {chosen}."


@cache
def manager(folder: Path | None) -> "TaskManager":
    """Index of the harness' tasks, or of those in a folder of our own."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False) if folder else TaskManager()


def leaves(name: str, folder: Path | None = None) -> list[str]:
    """Tasks that a task, group or tag of the harness consists of. Reads no data."""
    from lm_eval.tasks._index import Kind

    entry = manager(folder).task_index[name]
    if entry.kind is Kind.TAG:
        return sorted(entry.tags)
    if entry.kind is Kind.GROUP:
        return [leaf for child in entry.cfg["task"] for leaf in leaves(child, folder)]
    return [name]


def _task(name: str, benchmark: Benchmark, *, limit: int | None, folder: Path | None, data: str | None) -> Task:
    settings = {
        "lm_eval": version("lm_eval"),
        "num_fewshot": benchmark.num_fewshot,
        "metrics": benchmark.metrics,
        "filter": benchmark.filter,
        "limit": limit,
        "seed": SEED,
        "data": data,
    }
    return Task(name, settings, partial(_run, name, benchmark, limit, folder), online=data is None)


def _run(name: str, benchmark: Benchmark, limit: int | None, folder: Path | None, loaded: LoadedModel):
    from lm_eval import simple_evaluate

    from nitp_titan.evaluation.language_model import LanguageModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    without_download_counts()
    model = LanguageModel(loaded)
    try:
        task = manager(folder).load([name])["tasks"][name]
    except Exception as error:
        # Datasets, the hub and the network raise many types; each means that the task's data is not there.
        raise explained(error, "its data", "its data cannot be loaded") from error
    results = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=manager(folder),
        num_fewshot=benchmark.num_fewshot,
        limit=limit,
        bootstrap_iters=_BOOTSTRAPS,
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    if model.cut.seen:
        limit = f"{model.max_length} tokens, the model's context"
        print(f"warning: {name}: prompts of more than {limit}, lose their beginning")
    shown = results["n-shot"][name]
    assert shown == benchmark.num_fewshot, f"{name}: {shown} examples instead of {benchmark.num_fewshot}"
    samples = [sample for sample in results["samples"][name] if sample["filter"] == benchmark.filter]
    # The local suite leaves out perplexity by word where a text has no words.
    metrics = [metric for metric in benchmark.metrics if f"{metric},{benchmark.filter}" in results["results"][name]]
    return {metric: _score(results, name, metric, benchmark.filter, samples) for metric in metrics}


def _score(results: dict[str, Any], name: str, metric: str, filter_name: str, samples: list[dict]) -> Score:
    values = results["results"][name]
    value, stderr = values[f"{metric},{filter_name}"], values.get(f"{metric}_stderr,{filter_name}")
    fields = {
        "higher_is_better": results["higher_is_better"][name][metric],
        "documents": _identity(f"{sample['doc_id']} {sample['doc_hash']}" for sample in samples),
    }
    for way in (_mean, _bits, _perplexity):
        score = way([sample[metric] for sample in samples], fields)
        if score is not None and math.isclose(score.value, value, rel_tol=1e-9):
            return score
    known = float(stderr) if isinstance(stderr, int | float) else None
    return Score(value=value, stderr=known, size=len(samples), **fields)


# How the harness aggregates a metric's values over documents; `_score` takes the one that gives its number.


def _mean(values: list, fields: dict) -> Score | None:
    if all(isinstance(value, int | float) for value in values):
        return ratio([float(value) for value in values], [1.0] * len(values), **fields)
    return None


def _nats(values: list, fields: dict, unit: float) -> Score | None:
    if all(isinstance(value, tuple | list) and len(value) == 2 for value in values):
        return ratio([-value / unit for value, _ in values], [float(count) for _, count in values], **fields)
    return None


def _bits(values: list, fields: dict) -> Score | None:
    return _nats(values, fields, math.log(2))


def _perplexity(values: list, fields: dict) -> Score | None:
    score = _nats(values, fields, 1.0)
    # What no exponential can hold is the harness' to report.
    return score.exp() if score is not None and score.value < 700 else None


def _identity(keys) -> str:
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode() + b"\n")
    return digest.hexdigest()
