"""Scores, their errors and differences, and the tables made of them."""

import math
import statistics
from pathlib import Path

import torch
from torch.testing import assert_close

from nitp_titan.evaluation import scores
from nitp_titan.evaluation.plan import Average, Plan, Row
from nitp_titan.evaluation.pretrained import Model
from nitp_titan.evaluation.run import EvaluationSettings, Results
from nitp_titan.evaluation.scores import difference, ratio, Score
from nitp_titan.evaluation.tables import Comparison


def _score(values, weights=None, **fields) -> Score:
    return ratio(values, weights or [1.0] * len(values), **{"documents": "same", **fields})


def test_the_error_of_a_mean_is_the_usual_one():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert_close(_score(values).value, 0.6)
    assert_close(_score(values).stderr, statistics.stdev(values) / math.sqrt(5))
    assert _score([1.0]).stderr is None


def test_the_error_of_a_ratio_is_that_of_many_draws():
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(4000, 50, generator=draw, dtype=torch.float64) + 0.5
    values = 2 * weights + torch.randn(4000, 50, generator=draw, dtype=torch.float64)
    found = [_score(v.tolist(), w.tolist()).stderr for v, w in zip(values[:200], weights[:200])]
    assert_close(statistics.mean(found), (values.sum(1) / weights.sum(1)).std().item(), rtol=0.05, atol=0)


def test_a_pair_of_the_same_documents_has_the_error_of_their_differences():
    current, reference = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    found = difference(_score(current), _score(reference))
    assert found.pairs == 4 and found.value == 0.25
    assert_close(found.stderr, statistics.stdev([0.0, 1.0, 0.0, 0.0]) / 2)
    other = difference(_score(current), _score(reference, documents="others"))
    assert other.pairs == 0
    assert_close(other.stderr, math.hypot(_score(current).stderr, _score(reference).stderr))
    assert difference(_score(current, scale="nats of a"), _score(reference, scale="nats of b")) is None


def test_the_error_of_an_exponential_follows_its_slope():
    score = _score([1.0, 2.0, 3.0])
    assert_close(score.exp().value, math.exp(2))
    assert_close(score.exp().stderr, math.exp(2) * score.stderr)
    assert_close(sum(share**2 for share in score.exp().influence) * 3 / 2, score.exp().stderr ** 2)


def test_pooling_is_the_harness_own():
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr

    values, errors, sizes = [0.5, 0.25, 0.75], [0.1, 0.05, 0.2], [10, 40, 5]
    value, stderr = scores.pooled(values, errors, sizes)
    assert_close(value, aggregate_subtask_metrics(values, sizes))
    assert_close(stderr, float(pooled_sample_stderr(errors, sizes)))
    assert scores.pooled([0.5], [None], [1]) == (0.5, None)
    assert scores.pooled(values, [0.1, None, 0.2], sizes)[1] is None


MODELS = [Model("NTP", "a"), Model("NITP", "b")]
SETTINGS = EvaluationSettings(Path("out"), "float32", "cpu", 8)


def _comparison(plan: Plan, made: dict, failures=()) -> Comparison:
    return Comparison(MODELS, plan, SETTINGS, Results({"NTP": "1", "NITP": "2"}, made, dict(failures)))


def test_averages_are_over_the_benchmarks_that_all_models_have():
    rows = [Row("paper", name, "acc", "5-shot", (f"{name}_1", f"{name}_2")) for name in ("MMLU", "BBH", "C3")]
    averages = [Average("paper", "average of 4", ("MMLU", "BBH", "C3", "LCBench")), Average("paper", "few", ("C3",))]
    plan = Plan(rows=rows, averages=averages, missing=[("LCBench", "not in the harness")])
    one, zero = {"acc": _score([1.0, 0.0])}, {"acc": _score([0.0, 0.0])}
    ntp = {"MMLU_1": zero, "MMLU_2": zero, "BBH_1": one, "BBH_2": one, "C3_1": one, "C3_2": one}
    nitp = {"MMLU_1": one, "MMLU_2": one, "BBH_1": one, "BBH_2": one, "C3_1": one}
    comparison = _comparison(plan, {"NTP": ntp, "NITP": nitp}, {("NITP", "C3_2"): "no data"}.items())
    (average,) = comparison.as_json()["averages"]
    assert (average["ran"], average["of"], average["better"]) == (2, 4, {"NITP": 1})
    assert [cell["value"] for cell in average["scores"]] == [0.25, 0.5]
    assert average["scores"][1]["difference"]["value"] == 0.25
    page = comparison.markdown()
    assert "| average of 4 |  | 2 of 4 benchmarks, NITP better in 1 |" in page
    assert "- LCBench: not in the harness" in page and "- C3_2 of NITP: no data" in page
    # C3 of the model that has both halves.
    assert "| C3 | acc | 5-shot | 4 | 50.00 ± 35.36 | - | - |" in page


def test_differences_that_are_not_paired_are_marked():
    plan = Plan(rows=[Row("local", "x", "acc", "0-shot", ("x",)), Row("mteb", "y", "main score", "STS", ("y",))])
    made = {
        name: {"x": {"acc": _score([1.0, 0.0], documents=name)}, "y": {"main score": Score(value, None, 1)}}
        for name, value in (("NTP", 0.5), ("NITP", 0.75))
    }
    page = _comparison(plan, made).markdown()
    assert "| +0.00 ± 70.71 * |" in page
    assert "| y | main score | STS | - | 50.00 | 75.00 | +25.00 |" in page


def test_a_better_cross_entropy_is_lower():
    plan = Plan(rows=[Row("text", "x", "cross_entropy", "packed", ("x",))])
    made = {name: {"x": {"cross_entropy": _score([2.0, 3.0], higher_is_better=False)}} for name in ("NTP", "NITP")}
    assert "| x | cross entropy ↓ | packed | 2 | 2.5000 ± 0.5000 |" in _comparison(plan, made).markdown()
