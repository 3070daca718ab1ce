"""Suites of lm-evaluation-harness: the paper's benchmarks, groups, generation, cut prompts."""

import json
from pathlib import Path

import pytest
import torch
from hf_models import load
from torch.testing import assert_close

from nitp_titan.errors import UserError
from nitp_titan.evaluation import harness, scores, suites
from nitp_titan.evaluation.pretrained import read_models
from nitp_titan.evaluation.run import evaluate, EvaluationSettings
from nitp_titan.evaluation.scores import difference, Score


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
    assert all(difference(*pair).pairs for pair in zip(parts["nitp"], parts["ntp"]))


def test_generated_answers_are_filtered_and_matched(quiz, workplace):
    bench = suites.Benchmark("Continue", "continue", 0, ("exact_match",), "stripped")
    found = _run(bench, "continue", quiz, workplace / "ntp")["exact_match"]
    assert (found.value, found.size) == (0.5, 4) and found.influence is not None
    other = _run(bench, "continue", quiz, workplace / "nitp")["exact_match"]
    assert other.value == 0 and difference(other, found).pairs


def test_prompts_that_are_cut_are_said_once(quiz, workplace, capsys):
    _run(suites.Benchmark("Quiz", "quiz", 3), "quiz_short", quiz, workplace / "ntp")
    said = "warning: quiz_short: prompts of more than 512 tokens, the model's context, lose their beginning"
    assert capsys.readouterr().out.count(said) == 1


def test_an_unreachable_hub_is_said_before_any_work(workplace, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("nitp_titan.evaluation.run.load_pretrained", None)
    models, settings = read_models([f"{workplace}/ntp"]), EvaluationSettings(tmp_path, "float32", "cpu", 1)
    with pytest.raises(UserError, match="^http://127.0.0.1:9 cannot be reached .ConnectError., where the suite's data"):
        evaluate(models, harness.plan("quick", [], limit=None, local_folder=tmp_path), settings)


def test_a_tokenizer_that_ends_prompts_is_refused(workplace):
    from nitp_titan.evaluation.language_model import LanguageModel

    loaded = load(workplace / "ntp")
    loaded.tokenizer.eos_token = loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer.encode("a")[-1])
    with pytest.raises(UserError, match="its tokenizer ends every text with"):
        LanguageModel(loaded)
