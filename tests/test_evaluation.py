"""Suites of lm-evaluation-harness, their comparison and the command."""

import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import load, log_probs, nats_by_document, one_thread, save_llama, write_text
from torch.testing import assert_close

from nitp_titan.config import UserError
from nitp_titan.evaluation import harness, local_suite, scores, suites
from nitp_titan.evaluation.models import fingerprint
from nitp_titan.evaluation.plan import Average, Plan, Row, Task
from nitp_titan.evaluation.run import evaluate, Results, Settings
from nitp_titan.evaluation.scores import difference, ratio, Score
from nitp_titan.evaluation.store import ResultStore
from nitp_titan.evaluation.tables import Comparison
from nitp_titan.pretrained import Model, read_models

LIMIT = 20
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


# The command, once, with the real harness.


@pytest.fixture(scope="module")
def texts(assets):
    """Beginnings of documents that fit into one window, one of them not ASCII."""
    lines = (assets / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    return [json.loads(line)["text"][:1100] for line in lines] + ["Grüße, 世界! " * 5]


@pytest.fixture(scope="module")
def workplace(assets, texts, tmp_path_factory):
    """Two models, a text and its local suite."""
    folder = tmp_path_factory.mktemp("evaluation")
    for seed, name in enumerate(("ntp", "nitp")):
        save_llama(folder / name, assets, seed)
    local_suite.prepare(write_text(folder / "text.jsonl", texts), folder / "suite")
    return folder


def _command(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/evaluate.py", "--model", f"NTP={folder}/ntp", f"NITP={folder}/nitp"]
    command += ["--suite", "local", "--local-suite", f"{folder}/suite", "--limit", str(LIMIT), "--out", f"{folder}/out"]
    command += ["--text", f"{folder}/text.jsonl", "--seq-len", "128"]
    return subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True)


@pytest.fixture(scope="module")
def launch(workplace):
    done = _command(workplace)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(launch, workplace):
    return json.loads((workplace / "out/results.json").read_text())


def _cells(results, name, metric) -> dict:
    (row,) = [row for row in results["rows"] if (row["name"], row["metric"]) == (name, metric)]
    return {cell["model"]: cell for cell in row["scores"]}


def _choices(folder: Path, passages: list[dict], *, by_char: bool) -> list[float]:
    """Whether a model prefers the true continuation, by passage, with transformers alone."""
    loaded = load(folder)
    right = []
    for passage in passages:
        figures = []
        for choice in passage["choices"]:
            whole = loaded.tokenizer.encode(passage["context"] + choice)
            start = len(loaded.tokenizer.encode(passage["context"]))
            figure = log_probs(loaded.model, whole)[start - 1 :].sum().item()
            figures.append(figure / len(choice) if by_char else figure)
        right.append(float(max(range(4), key=figures.__getitem__) == passage["answer"]))
    return right


@pytest.mark.parametrize(("metric", "by_char"), [("acc", False), ("acc_norm", True)])
def test_choices_are_those_of_the_likelihoods(metric, by_char, results, workplace):
    lines = (workplace / "suite/passages.jsonl").read_text(encoding="utf-8").splitlines()[:LIMIT]
    passages = [json.loads(line) for line in lines]
    ntp, nitp = (_choices(workplace / name, passages, by_char=by_char) for name in ("ntp", "nitp"))
    # Else the paired error would be zero in any case.
    assert ntp != nitp and len(set(ntp)) == 2
    cells = _cells(results, "continuation", metric)
    assert_close(cells["NTP"]["value"], statistics.mean(ntp))
    assert_close(cells["NTP"]["stderr"], statistics.stdev(ntp) / math.sqrt(LIMIT))
    assert_close(cells["NITP"]["value"], statistics.mean(nitp))
    steps = [ours - theirs for ours, theirs in zip(nitp, ntp)]
    assert_close(cells["NITP"]["difference"]["value"], statistics.mean(steps))
    assert_close(cells["NITP"]["difference"]["stderr"], statistics.stdev(steps) / math.sqrt(LIMIT))
    assert cells["NITP"]["difference"]["paired"] and "difference" not in cells["NTP"]


def test_perplexity_of_the_local_suite_is_that_of_whole_documents_after_one_bos(results, workplace, texts):
    texts = texts[:LIMIT]
    for name, model in (("NTP", "ntp"), ("NITP", "nitp")):
        loaded = load(workplace / model)
        nats = -sum(log_probs(loaded.model, loaded.tokenizer.encode(text)).sum().item() for text in texts)
        size = sum(len(text.encode()) for text in texts)
        words = sum(len(text.split()) for text in texts)
        assert_close(
            _cells(results, "text", "bits_per_byte")[name]["value"], nats / math.log(2) / size, rtol=1e-5, atol=0
        )
        assert_close(
            _cells(results, "text", "byte_perplexity")[name]["value"], math.exp(nats / size), rtol=1e-5, atol=0
        )
        # The harness counts the words between any two spaces, empty ones at the ends too.
        found = math.log(_cells(results, "text", "word_perplexity")[name]["value"])
        assert_close(found, nats / words, rtol=0.02, atol=0)


def test_cross_entropy_of_a_text_is_that_of_its_documents(results, workplace, texts):
    differences = {}
    for name, model in (("NTP", "ntp"), ("NITP", "nitp")):
        loaded = load(workplace / model)
        documents = [[*loaded.tokenizer.encode(text), 1] for text in texts]
        counts = [len(tokens) - 1 for tokens in documents]
        nats = nats_by_document(loaded.model, documents, seq_len=128)
        differences[name] = (nats, counts)
        assert_close(
            _cells(results, "text.jsonl", "cross_entropy")[name]["value"], sum(nats) / sum(counts), rtol=1e-5, atol=0
        )
    (ntp, counts), (nitp, _) = differences.values()
    steps = [ours - theirs for ours, theirs in zip(nitp, ntp)]
    mean = sum(steps) / sum(counts)
    rest = [step - mean * count for step, count in zip(steps, counts)]
    expected = math.sqrt(len(rest) / (len(rest) - 1) * sum(part**2 for part in rest)) / sum(counts)
    found = _cells(results, "text.jsonl", "cross_entropy")["NITP"]["difference"]
    assert found["paired"]
    assert_close([found["value"], found["stderr"]], [mean, expected], rtol=1e-3, atol=1e-6)


def test_the_page_says_what_was_run(launch, results, workplace):
    page = (workplace / "out/results.md").read_text()
    assert page in launch
    assert "| benchmark | metric | setting | documents | NTP | NITP | NITP - NTP |" in page
    assert f"LIMITED to the first {LIMIT} documents" in page
    cell = _cells(results, "continuation", "acc")["NITP"]
    step = cell["difference"]
    figures = [f"{100 * cell['value']:.2f} ± {100 * cell['stderr']:.2f}"]
    figures.append(f"{100 * step['value']:+.2f} ± {100 * step['stderr']:.2f}")
    assert f"| continuation | acc | 0-shot | {LIMIT} | " in page and " | ".join(figures) in page
    assert "packed in sequences of 128 tokens (--seq-len)" in page
    assert "float32 on cpu; lm_eval 0.4.13, transformers" in page
    assert results["versions"]["lm_eval"] == "0.4.13" and results["baseline"] == "NTP"


def test_only_what_changed_is_run_again(launch, workplace):
    out = workplace / "out"
    before = (out / "results.json").read_text()
    cut = out / "results/NTP/local_continuation.json"
    cut.write_text(cut.read_text()[:100])
    os.utime(workplace / "nitp/model.safetensors", (1, 1))
    again = _command(workplace).stdout
    assert "2 results are there already, 4 to run" in again
    ran = [line.split(" (")[0] for line in again.splitlines() if "left" in line]
    assert ran == [
        "NTP: local_continuation",
        "NITP: text-text",
        "NITP: local_continuation",
        "NITP: local_perplexity",
    ]
    third = _command(workplace)
    assert "6 results are there already, 0 to run" in third.stdout and third.returncode == 0
    after = json.loads((out / "results.json").read_text())
    assert after["rows"] == json.loads(before)["rows"]
    assert not list(out.rglob("*.tmp"))


# The suites.


@pytest.fixture(scope="module")
def index():
    return harness.manager(None).task_index


def test_the_harness_has_every_benchmark_with_our_settings(index):
    from importlib.metadata import version

    assert version("lm_eval").startswith("0.4.13"), "suites.py names what the harness lacks"
    counts = {"mmlu": 57, "mmlu_pro": 14, "ceval-valid": 52, "bbh": 27, "agieval": 21}
    for bench in suites.PAPER:
        assert bool(bench.task) != bool(bench.missing)
        if not bench.task:
            continue
        tasks = harness.leaves(bench.task)
        assert len(tasks) == len(set(tasks)) == counts.get(bench.task, 1)
        for task in tasks:
            config = index[task].cfg
            assert config.get("num_fewshot") in (None, bench.num_fewshot), task
            assert set(bench.metrics) <= {entry["metric"] for entry in config["metric_list"]}, task
            filters = {entry["name"] for entry in config.get("filter_list", [])} or {"none"}
            assert bench.filter in filters, task


def test_groups_are_aggregated_by_documents_as_ours_are(index):
    for bench in suites.PAPER:
        if bench.task and "group" in index[bench.task].cfg:
            (entry,) = [e for e in index[bench.task].cfg["aggregate_metric_list"] if e["metric"] in bench.metrics]
            assert entry["weight_by_size"] is True
            assert entry.get("filter_list", bench.filter) == bench.filter


def test_benchmarks_that_the_harness_lacks_are_not_there_under_another_name(index):
    lacking = [bench.name for bench in suites.PAPER if not bench.task]
    assert lacking == ["Xiezhi", "Balanced COPA", "C3", "LCBench"]
    for word in ("xiezhi", "balanced_copa", "balanced-copa", "lcbench", "leetcode"):
        assert not [name for name in index if word in name.lower()]
    assert not {"c3", "clue_c3", "cluewsc"} & set(index)


def test_the_papers_averages_are_over_its_benchmarks():
    names = {bench.name for bench in suites.PAPER}
    assert len(names) == 13 and len(suites.DENSE) == 7 and len(suites.ABLATIONS) == 5
    assert set(suites.DENSE) <= names and set(suites.ABLATIONS) <= names


def test_a_plan_names_what_is_missing_and_how_the_rest_is_run(index, tmp_path):
    plan = harness.plan("paper", [], limit=None, local_folder=tmp_path)
    assert [name for name, _ in plan.missing] == ["Xiezhi", "Balanced COPA", "C3", "LCBench"]
    assert all("not in lm-evaluation-harness 0.4.13" in reason for _, reason in plan.missing)
    assert "ARC-Challenge (25)" in plan.notes[0] and "The paper names no numbers of examples" in plan.notes[0]
    assert len(plan.tasks) == 57 + 14 + 52 + 27 + 21 + 4
    some = harness.plan("paper", ["LAMBADA", "gsm8k"], limit=5, local_folder=tmp_path)
    assert [task.name for task in some.tasks] == ["lambada_openai", "gsm8k"]
    assert some.tasks[1].settings["limit"] == 5 and some.tasks[1].settings["num_fewshot"] == 5


GROUP = """
group: quiz
task: [quiz_long, quiz_short]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""
QUIZ = """
task: quiz_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl, dev: {folder}/dev.jsonl}}}}
test_split: test
fewshot_split: dev
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
CONTINUE = """
task: continue
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/greedy.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{max_gen_toks: 4, do_sample: false, until: ["never to be seen"]}}
filter_list:
  - name: stripped
    filter: [{{function: remove_whitespace}}, {{function: take_first}}]
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def quiz(workplace):
    """A group of two tasks with examples, and one that generates; half of its answers are the model's own."""
    folder = workplace / "quiz"
    folder.mkdir()
    lines = (workplace / "suite/passages.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("dev", lines[:3]), ("long", lines[3:16]), ("short", lines[16:21])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    loaded = load(workplace / "ntp")
    greedy = []
    for index, prompt in enumerate(("import os", "def f(x):", "class A:", "for x in y:")):
        tokens = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(4):
                tokens = torch.cat([tokens, loaded.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        own = loaded.tokenizer.decode(tokens[0, -4:], skip_special_tokens=True)
        greedy.append({"text": prompt, "target": own.lstrip() if index % 2 else "something else"})
    (folder / "greedy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in greedy))
    for name, task in (("long", QUIZ), ("short", QUIZ), ("continue", CONTINUE)):
        (folder / f"{name}.yaml").write_text(task.format(name=name, folder=folder))
    (folder / "group.yaml").write_text(GROUP)
    return folder


def _run(bench: suites.Benchmark, name: str, folder: Path, model: Path) -> dict[str, Score]:
    return harness._task(name, bench, limit=None, folder=folder, data="").run(load(model))


def test_a_group_run_by_its_tasks_is_the_harness_own_group(quiz, workplace):
    from lm_eval import simple_evaluate

    from nitp_titan.evaluation.language_model import LanguageModel

    bench = suites.Benchmark("Quiz", "quiz", 2)
    parts = {}
    for model in ("ntp", "nitp"):
        names = harness.leaves("quiz", quiz)
        assert names == ["quiz_long", "quiz_short"]
        parts[model] = [_run(bench, name, quiz, workplace / model)["acc"] for name in names]
        found = scores.pooled(*zip(*((part.value, part.stderr, part.size) for part in parts[model])))
        language_model = LanguageModel(load(workplace / model))
        own = simple_evaluate(language_model, tasks=["quiz"], task_manager=harness.manager(quiz), num_fewshot=2)
        group = own["results"]["quiz"]
        assert_close(found, (group["acc,none"], float(group["acc_stderr,none"])))
        assert [part.size for part in parts[model]] == [13, 5]
    assert all(difference(*pair).paired for pair in zip(parts["nitp"], parts["ntp"]))


def test_generated_answers_are_filtered_and_matched(quiz, workplace):
    bench = suites.Benchmark("Continue", "continue", 0, ("exact_match",), "stripped")
    found = _run(bench, "continue", quiz, workplace / "ntp")["exact_match"]
    assert (found.value, found.size) == (0.5, 4) and found.influence is not None
    other = _run(bench, "continue", quiz, workplace / "nitp")["exact_match"]
    assert other.value == 0 and difference(other, found).paired


def test_prompts_that_are_cut_are_said_once(quiz, workplace, capsys):
    _run(suites.Benchmark("Quiz", "quiz", 3), "quiz_short", quiz, workplace / "ntp")
    said = "warning: quiz_short: prompts of more than 512 tokens, the model's context, lose their beginning"
    assert capsys.readouterr().out.count(said) == 1


def test_an_unreachable_hub_is_said_before_any_work(workplace, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("nitp_titan.evaluation.run.load_pretrained", None)
    models, settings = read_models([f"{workplace}/ntp"]), Settings(tmp_path, "float32", "cpu", 1)
    with pytest.raises(UserError, match="^http://127.0.0.1:9 cannot be reached .ConnectError., where the suite's data"):
        evaluate(models, harness.plan("quick", [], limit=None, local_folder=tmp_path), settings)


def test_a_tokenizer_that_ends_prompts_is_refused(workplace):
    from nitp_titan.evaluation.language_model import LanguageModel

    loaded = load(workplace / "ntp")
    loaded.tokenizer.eos_token = loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer.encode("a")[-1])
    with pytest.raises(UserError, match="its tokenizer ends every text with"):
        LanguageModel(loaded)


# The local suite.


def test_passages_have_one_true_continuation_and_three_of_other_documents():
    documents = [f"{name} " * 400 for name in ("alpha", "beta", "gamma", "delta", "eps")]
    passages = local_suite.continuations(documents)
    assert passages == local_suite.continuations(documents)
    assert {passage["answer"] for passage in passages} == {0, 1, 2, 3}
    for passage in passages:
        word = passage["context"].split()[-1]
        assert [word in choice for choice in passage["choices"]].index(True) == passage["answer"]
        assert sum(word in choice for choice in passage["choices"]) == 1
        assert len({choice.split()[0] for choice in passage["choices"]}) == 4
        # The harness moves spaces at the end of a context.
        assert not passage["context"][-1].isspace() and passage["choices"][0][0].isspace()


def test_the_truth_follows_its_context_in_the_document_with_and_without_spaces():
    documents = ["".join(chr(0x4E00 + i * 2000 + n) for n in range(1500)) for i in range(4)]
    for passage in local_suite.continuations(documents):
        truth = passage["context"] + passage["choices"][passage["answer"]]
        assert sum(truth in document for document in documents) == 1 and len(truth) == 500


def test_the_suite_is_made_again_when_its_text_changes(tmp_path):
    documents = [f"{name} " * 400 for name in ("alpha", "beta", "gamma", "delta")]
    text = write_text(tmp_path / "text.jsonl", documents)
    first = local_suite.prepare(text, tmp_path / "suite")
    assert first["new"] and first["documents"] == 4
    assert not local_suite.prepare(text, tmp_path / "suite")["new"]
    identity = local_suite.ensure(tmp_path / "suite")
    write_text(text, [*documents, "eps " * 400])
    assert local_suite.ensure(tmp_path / "suite") != identity
    assert len((tmp_path / "suite/documents.jsonl").read_text().splitlines()) == 5
    text.unlink()
    local_suite.ensure(tmp_path / "suite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["suite"]


def test_a_text_without_words_has_no_perplexity_by_word(tmp_path):
    documents = ["".join(chr(0x4E00 + (i * 1000 + n) % 20000) for n in range(1500)) for i in range(4)]
    local_suite.prepare(write_text(tmp_path / "text.jsonl", documents), tmp_path / "suite")
    task = (tmp_path / "suite/local_perplexity.yaml").read_text()
    assert "byte_perplexity" in task and "word_perplexity" not in task


# Scores and tables.


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
    ours, theirs = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    found = difference(_score(ours), _score(theirs))
    assert found.paired and found.value == 0.25
    assert_close(found.stderr, statistics.stdev([0.0, 1.0, 0.0, 0.0]) / 2)
    other = difference(_score(ours), _score(theirs, documents="others"))
    assert not other.paired
    assert_close(other.stderr, math.hypot(_score(ours).stderr, _score(theirs).stderr))
    assert difference(_score(ours, scale="nats of a"), _score(theirs, scale="nats of b")) is None


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
SETTINGS = Settings(Path("out"), "float32", "cpu", 8)


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


# Running and keeping.


def test_results_are_valid_for_one_setting(tmp_path):
    store = ResultStore(tmp_path)
    made = {"acc": _score([1.0, 0.0, 1.0])}
    store.save("owner/name", "mmlu", {"limit": None, "metrics": ("acc",)}, made)
    assert store.load("owner/name", "mmlu", {"limit": None, "metrics": ("acc",)}) == made
    assert store.load("owner/name", "mmlu", {"limit": 5, "metrics": ("acc",)}) is None
    assert store.load("owner/name", "bbh", {"limit": None, "metrics": ("acc",)}) is None
    assert store.path("owner/name", "mmlu") == tmp_path / "results/owner-name/mmlu.json"
    store.path("owner/name", "mmlu").write_text("[]")
    assert store.load("owner/name", "mmlu", {"limit": None, "metrics": ("acc",)}) is None


def test_a_task_that_fails_leaves_the_others(workplace, tmp_path, capsys):
    def fail(loaded):
        raise UserError("its data are not there")

    tasks = [Task("bad", {}, fail), Task("good", {}, lambda loaded: {"acc": _score([1.0, 0.0])})]
    models = read_models([f"NTP={workplace}/ntp"])
    found = evaluate(models, Plan(tasks=tasks), Settings(tmp_path, "float32", "cpu", 1))
    assert found.failures == {("NTP", "bad"): "its data are not there"} and list(found.scores["NTP"]) == ["good"]
    assert "NTP: bad was not run: its data are not there (1 of 2" in capsys.readouterr().out


def test_what_was_finished_is_kept_when_a_run_is_stopped(workplace, tmp_path):
    def stop(loaded):
        raise KeyboardInterrupt

    tasks = [Task("first", {}, lambda loaded: {"acc": _score([1.0])}), Task("second", {}, stop)]
    models, settings = read_models([f"NTP={workplace}/ntp"]), Settings(tmp_path, "float32", "cpu", 1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(models, Plan(tasks=tasks), settings)
    ran = []
    tasks = [Task(name, {}, lambda loaded, name=name: ran.append(name) or {}) for name in ("first", "second")]
    evaluate(models, Plan(tasks=tasks), settings)
    assert ran == ["second"]


def test_a_fingerprint_is_of_weights_configuration_and_tokenizer(workplace, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(workplace / "ntp", folder)
    prints = [fingerprint(str(folder))]
    assert fingerprint(str(folder)) == prints[0]
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text((folder / name).read_text() + " ")
        prints.append(fingerprint(str(folder)))
    os.utime(folder / "model.safetensors", (1, 1))
    prints.append(fingerprint(str(folder)))
    assert len(set(prints)) == 4


def test_models_are_called_by_their_folder_or_name(workplace, tmp_path):
    ntp = f"{workplace}/ntp"
    assert read_models([ntp, f"x={workplace}/nitp"]) == [Model("ntp", ntp), Model("x", f"{workplace}/nitp")]
    twin = tmp_path / "lr=3" / "ntp"
    shutil.copytree(ntp, twin)
    assert [model.name for model in read_models([ntp, str(twin)])] == [ntp, str(twin)]
    assert read_models([str(twin)]) == [Model("ntp", str(twin))]


# Mistakes.


def _script(name: str):
    spec = importlib.util.spec_from_file_location(name, f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _mistake(monkeypatch, name: str, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(UserError) as error:
        _script(name).main()
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "nothing to evaluate: give --suite (paper, quick, local, mteb) or --text FILE.jsonl, or both."),
        ("--suite papr", "--suite papr is not known. Did you mean 'paper'?"),
        (
            "--suite quick --tasks lambda",
            "--tasks lambda: the suite 'quick' has no such task. Did you mean 'lambada_op",
        ),
        ("--suite mteb --tasks STS99", "--tasks STS99: the suite 'mteb' has no such task. Did you mean 'STS1"),
        ("--suite paper --tasks Xiezhi", "--tasks Xiezhi: not in lm-evaluation-harness 0.4.13."),
        ("--suite mteb --limit 3", "--limit 3: at least 1, and for the suites of the harness only"),
        ("--suite quick --limit 0", "--limit 0: at least 1"),
        ("--tasks mmlu --text README.md", "--tasks chooses from a suite; give --suite too."),
        ("--suite quick --dtype bfloat", "--dtype bfloat is not known. Did you mean 'bfloat16'?"),
        ("--suite quick --device cpux", "--device cpux: "),
        ("--suite quick --batch-size 0", "--batch-size 0: at least 1."),
        (
            "--suite local --local-suite {tmp}/none",
            "there is no local suite in {tmp}/none. Run `python scripts/prepare",
        ),
        ("--suite local --local-suite {work}/suite --out {work}/text.jsonl/x", "--out {work}/text.jsonl/x cannot be"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments, message, workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(local_suite, "DEFAULT_TEXT", tmp_path / "no.jsonl")
    fill = {"tmp": tmp_path, "work": workplace}
    said = _mistake(monkeypatch, "evaluate", "--model", f"{workplace}/ntp", *arguments.format(**fill).split())
    assert message.format(**fill) in said and "\n" not in said


def test_a_missing_model_gets_the_nearest_name(workplace, monkeypatch):
    said = _mistake(monkeypatch, "evaluate", "--suite", "quick", "--model", f"{workplace}/ntpp")
    assert f"{workplace}/ntpp is neither a folder nor" in said and f"Did you mean '{workplace}/ntp'?" in said


def test_two_models_of_one_name_are_refused(workplace, monkeypatch):
    said = _mistake(monkeypatch, "evaluate", "--suite", "quick", "--model", f"a={workplace}/ntp", f"a={workplace}/nitp")
    assert "two models are called 'a'" in said


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"text": "a"}\n', "", "the continuations need 4 documents of more than 500 characters."),
        ('{"text": "a"}\n{"body": "b"}\n', "", "{file}, line 2: there is no --text-field 'text'."),
        ('{"text": "a"}\n[1]\n', "", "{file}, line 2: an object with the field 'text' must stand in every line."),
        ('{"text": "a"}\n', "--text-field txt", "{file}, line 1: there is no --text-field 'txt'. Did you mean 'text'?"),
        (None, "", "--text {file} cannot be read: No such file or directory."),
    ],
)
def test_mistakes_in_a_text_are_named(content, arguments, message, tmp_path, monkeypatch):
    file = tmp_path / "text.jsonl"
    if content is not None:
        file.write_text(content)
    out = tmp_path / "suite"
    said = _mistake(monkeypatch, "prepare_local_suite", "--text", str(file), "--out", str(out), *arguments.split())
    assert message.format(file=file) in said
    assert not out.exists()


def test_a_folder_of_something_else_is_not_replaced(workplace, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something else; choose another folder."):
        local_suite.prepare(workplace / "text.jsonl", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_in_which_nothing_ran_says_why(workplace, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n{"text": null}\n')
    command = [sys.executable, "scripts/evaluate.py", "--model", f"{workplace}/ntp", "--text", str(text)]
    done = subprocess.run(
        [*command, "--out", f"{tmp_path}/out"], env=os.environ | ONE_THREAD, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("error: text-text of ntp was not run: --text-field 'text': a document of")
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "out/results.md").exists()
