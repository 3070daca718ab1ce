"""The command, once, with the real harness, and what it says of mistakes."""

import contextlib
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
from hf_models import load, log_probs, nats_by_document
from processes import PROJECT, warm_python
from readme import documented
from torch.testing import assert_close

from nitp_titan.errors import UserError
from nitp_titan.evaluation import local_suite

LIMIT = 20
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


# What the command imports, and takes seconds.
IMPORTS = ("transformers", "lm_eval", "lm_eval.models.huggingface")


def _command(folder: Path, *, warm: bool = True) -> subprocess.CompletedProcess:
    script, *arguments = documented("scripts/evaluate.py")
    # Where the command looks for its models; its other paths are given anew.
    (folder / "outputs").mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / "outputs/hf").symlink_to(folder)
    command = [str(PROJECT / script), *arguments, "--local-suite", f"{folder}/suite", "--limit", str(LIMIT)]
    command += ["--out", f"{folder}/out", "--text", f"{folder}/text.jsonl", "--seq-len", "128"]
    environment = os.environ | ONE_THREAD
    if warm:
        return warm_python(*command, env=environment, preload=IMPORTS, cwd=folder)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=folder)


@pytest.fixture(scope="module")
def launch(workplace):
    done = _command(workplace, warm=False)
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
        stats = []
        for choice in passage["choices"]:
            whole = loaded.tokenizer.encode(passage["context"] + choice)
            start = len(loaded.tokenizer.encode(passage["context"]))
            log_prob = log_probs(loaded.model, whole)[start - 1 :].sum().item()
            stats.append(log_prob / len(choice) if by_char else log_prob)
        right.append(float(max(range(4), key=stats.__getitem__) == passage["answer"]))
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
    stats = [f"{100 * cell['value']:.2f} ± {100 * cell['stderr']:.2f}"]
    stats.append(f"{100 * step['value']:+.2f} ± {100 * step['stderr']:.2f}")
    assert f"| continuation | acc | 0-shot | {LIMIT} | " in page and " | ".join(stats) in page
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
        ('{"text": "a"}\n{"body": "b"}\n', "", "--text-field 'text': {file}, line 2: there is no field 'text'."),
        ('{"text": "a"}\n[1]\n', "", "--text: {file}, line 2: a list [1] and not an object with the field 'text'"),
        ('{"text": "a"}\n', "--text-field txt", "line 1: there is no field 'txt'. Did you mean 'text'?"),
        (None, "", "--text {file} is not a file."),
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
    model = shutil.copytree(workplace / "ntp", tmp_path / "ntp")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    text = workplace / "text.jsonl"
    command = ["scripts/evaluate.py", "--model", str(model), "--text", str(text), "--out", f"{tmp_path}/out"]
    done = warm_python(*command, env=os.environ | ONE_THREAD, preload=IMPORTS)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith(f"error: text-text of ntp was not run: {model} has no token that ends a document")
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "out/results.md").exists()
