"""Text that is tokenized once: the same sequences from tokens as from text, folders that survive a kill."""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torchtitan.train
from helpers import make_config, train
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.observability.structured_logger import structured_logging

import nitp_titan.train
from nitp_titan.data.loader import check_dataset, check_sources, TextDataLoader
from nitp_titan.data.mixtures import TextSource
from nitp_titan.data.tokens import workers
from nitp_titan.data.tokens.folder import Manifest
from nitp_titan.data.tokens.writing import (
    alone_in,
    open_job,
    settings_of,
    tokenize,
    verify,
)
from nitp_titan.errors import UserError
from nitp_titan.runs import ranks
from nitp_titan.runs.run_folder import plan_resume
from nitp_titan.step_files import read_records

SEQ_LEN, GLOBAL_BATCH = 32, 6


@pytest.fixture(scope="module")
def tokenizer(assets):
    return HuggingFaceTokenizer(HuggingFaceTokenizer.Config(), tokenizer_path=str(assets))


@pytest.fixture(scope="module")
def texts(assets):
    """Real texts of a few tokens to ten sequences, and one of none."""
    lines = (assets / "validation.jsonl").read_text().splitlines()
    return ["", *(json.loads(line)["text"][: 7 + 397 * index % 900] for index, line in enumerate(lines[:24]))]


@pytest.fixture(scope="module")
def sources(assets, texts, tmp_path_factory):
    """Two texts, and the tokens of each: (texts, tokens)."""
    found = []
    for letter, rows, weight in (("a", texts, 0.7), ("b", texts[::-3], 0.3)):
        folder = tmp_path_factory.mktemp(letter)
        text = TextSource(dataset_path=_write(folder / "text.jsonl", rows), weight=weight)
        _tokenize(text, assets, folder / "tokens", num_shards=4)
        found.append((text, TextSource(dataset="tokens", dataset_path=str(folder / "tokens"), weight=weight)))
    return tuple(zip(*found))


def _write(path, texts):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def _tokenize(source, tokenizer, folder, *, num_workers=1, num_shards=None):
    """The manifest of a new folder, and what the log said."""
    said = []
    options = {"num_shards": num_shards, "num_workers": num_workers, "log": said.append}
    manifest, is_new = tokenize(source, str(tokenizer), folder, **options)
    assert is_new
    return manifest, said


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _steps(tokenizer, num_steps, *, num_ranks=1, state=None, **config):
    """What all ranks together train in each step, sequence after sequence, and the state of all of them after it."""
    options = {"dp_world_size": num_ranks, "seq_len": SEQ_LEN, "local_batch_size": GLOBAL_BATCH // num_ranks}
    make = TextDataLoader.Config(**config).build
    loaders = [make(tokenizer=tokenizer, dp_rank=rank, **options) for rank in range(num_ranks)]
    for loader in loaders if state else ():
        # A rank asks a checkpoint for its own parts.
        loader.load_state_dict({key: state[key] for key in loader.state_dict()})
    iterators, steps = [iter(loader) for loader in loaders], []
    for _ in range(num_steps):
        batches = [next(iterator) for iterator in iterators]
        rows = [zip(inputs["input"], inputs["positions"], labels) for inputs, labels in batches]
        steps.append([[part.tolist() for part in row] for of_all_ranks in zip(*rows) for row in of_all_ranks])
    # As a checkpoint on disk would give it back.
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    return steps, {key: value for state in states for key, value in state.items()}


def _epoch(state):
    return min(stream["document"]["epoch"] for key in state if "stream_" in key for stream in json.loads(state[key]))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_streams", [1, 3])
@pytest.mark.parametrize("mixture", [False, True])
def test_tokens_give_the_sequences_of_their_text_in_every_epoch(tokenizer, sources, mixture, num_streams, shuffle):
    texts, tokens = sources
    config = {"num_streams": num_streams, "shuffle": shuffle, "seed": 7}
    expected, state = _steps(tokenizer, 90, **config, sources=[*texts] if mixture else [texts[0]])
    assert _epoch(state) >= 2
    # In a mixture the second source may stay text.
    given = [tokens[0], texts[1]] if mixture else [tokens[0]]
    for num_ranks in (1, 2, 3):
        assert _steps(tokenizer, 90, num_ranks=num_ranks, **config, sources=given) == (expected, state)


@pytest.mark.parametrize("num_streams", [1, 3])
def test_shuffled_tokens_resume_on_other_ranks_without_a_lost_or_repeated_sequence(tokenizer, sources, num_streams):
    config = {"num_streams": num_streams, "shuffle": True, "sources": [*sources[1]]}
    expected, _ = _steps(tokenizer, 48, **config)
    for path in ((1, 3, 2, 1), (2, 6, 3, 2)):
        state, steps = None, []
        for num_ranks in path:
            more, state = _steps(tokenizer, 48 // len(path), num_ranks=num_ranks, state=state, **config)
            steps += more
        assert steps == expected, path


def test_a_run_on_text_resumes_with_tokens(tokenizer, sources):
    (text, *_), (tokens, *_) = sources
    expected, _ = _steps(tokenizer, 30, sources=[text])
    first, state = _steps(tokenizer, 11, sources=[text])
    assert first + _steps(tokenizer, 19, state=state, sources=[tokens])[0] == expected


def test_shuffle_is_another_order_of_the_first_epoch_and_off_by_default(tokenizer, sources):
    kept, default, shuffled = (
        _steps(tokenizer, 10, sources=[sources[0][0]], **option)[0]
        for option in ({"shuffle": False}, {}, {"shuffle": True})
    )
    assert kept == default != shuffled


def test_a_data_worker_reads_tokens_alike(tokenizer, sources):
    config = {"sources": [sources[1][0]], "shuffle": True}
    assert _steps(tokenizer, 30, **config, num_workers=1) == _steps(tokenizer, 30, **config)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_files_hold_the_tokens_of_every_document_in_order(tmp_path, texts, tokenizer, assets, dtype):
    if dtype == "uint32":
        texts, folder = ["w1 w69999", "w65536", "", "w3 w3 w2"], tmp_path / "words"
        tokenizer = _words(folder, 70_000)
    else:
        folder = assets
    path = _write(tmp_path / "text.jsonl", texts)
    manifest, _ = _tokenize(TextSource(dataset_path=path), folder, tmp_path / "tokens", num_shards=3)
    expected = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in texts]
    assert manifest.dtype == dtype and manifest.vocab_size == tokenizer.get_vocab_size()
    raw = b"".join((tmp_path / f"tokens/shard_{index:05}.tokens").read_bytes() for index in range(3))
    borders = memoryview((tmp_path / "tokens/documents.offsets").read_bytes()).cast("q").tolist()
    tokens = memoryview(raw).cast("H" if dtype == "uint16" else "I").tolist()
    assert [tokens[start:end] for start, end in zip(borders, borders[1:])] == expected
    assert borders[-1] == len(tokens) == manifest.tokens and len(expected) == manifest.documents
    (row, *_), _ = _steps(tokenizer, 1, dataset="tokens", dataset_path=str(tmp_path / "tokens"))
    assert row == _steps(tokenizer, 1, dataset_path=path)[0][0]


def _words(folder, count):
    """A tokenizer of whole words w0, w1, ..."""
    from tokenizers import models, pre_tokenizers, Tokenizer

    folder.mkdir()
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(count)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "w1", "eos_token": "w2"}))
    return HuggingFaceTokenizer(HuggingFaceTokenizer.Config(), tokenizer_path=str(folder))


def test_the_folder_does_not_depend_on_the_number_of_workers(tmp_path, texts, assets):
    text = TextSource(dataset_path=_write(tmp_path / "text.jsonl", texts * 4))
    one, _ = _tokenize(text, assets, tmp_path / "one", num_shards=7)
    _tokenize(text, assets, tmp_path / "two", num_shards=7, num_workers=2)
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")
    assert [shard.part for shard in one.shards][:2] == ["documents 0:15", "documents 15:30"]
    assert sorted(_contents(tmp_path / "one")) == [
        "documents.offsets",
        "manifest.json",
        *(f"shard_{index:05}.tokens" for index in range(7)),
    ]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_stream_is_cut_between_its_files_and_keeps_its_order(tmp_path, texts, assets, ending):
    for index in range(3):
        _write(tmp_path / f"{index}.{ending}", texts[index * 9 : index * 9 + 9])
    text = TextSource(dataset_path=str(tmp_path / f"*.{ending}"), streaming=True)
    manifest, said = _tokenize(text, assets, tmp_path / "stream", num_workers=4)
    size = sum(file.stat().st_size for file in tmp_path.glob(f"*.{ending}"))
    assert said == [
        f"'{text.dataset_path}': 3 files, {size:,} bytes, streamed",
        f"'{text.dataset_path}' is streamed, 3 files for 4 workers: only so many of them read",
    ]
    assert [shard.part for shard in manifest.shards] == ["files 0:1", "files 1:2", "files 2:3"]
    indexed, _ = _tokenize(dataclasses.replace(text, streaming=False), assets, tmp_path / "indexed", num_shards=1)
    streamed = b"".join((tmp_path / f"stream/shard_{index:05}.tokens").read_bytes() for index in range(3))
    assert streamed == (tmp_path / "indexed/shard_00000.tokens").read_bytes()
    assert manifest.offsets_sha256 == indexed.offsets_sha256
    with pytest.raises(
        UserError, match=r"--num-shards 4: at least 1 and at most 3, as .* has 3 files, and a stream is"
    ):
        _tokenize(text, assets, tmp_path / "more", num_shards=4)


def test_the_log_says_shards_documents_tokens_speed_and_time_left(tmp_path, texts, assets, monkeypatch):
    monkeypatch.setattr(workers, "SECONDS_BETWEEN_LINES", 0.05)
    text = TextSource(dataset_path=_write(tmp_path / "text.jsonl", texts * 40))
    _, said = _tokenize(text, assets, tmp_path / "tokens")
    line = re.compile(r"shard \d+/64  documents ([\d,]+)  tokens [\d,]+  [\d,]+ tok/s(  left [\dhms]+)?")
    assert said[0] == f"'{text.dataset_path}': 1 file, 1,000 documents"
    documents = [int(line.fullmatch(each)[1].replace(",", "")) for each in said[1:]]
    assert documents and documents[-1] <= 1000 and "left" in said[-1]


def test_the_log_says_what_is_left_out(tmp_path, texts, assets):
    for name in ("text.jsonl", "more.jsonl.zst"):
        _write(tmp_path / name, texts)
    _, said = _tokenize(TextSource(dataset_path=str(tmp_path)), assets, tmp_path / "tokens", num_shards=1)
    left_out = f"warning: '{tmp_path}': not read: {tmp_path}/more.jsonl.zst (of another ending, or a dead link)"
    assert said == [f"'{tmp_path}': 1 file, {len(texts)} documents", left_out]


def test_a_worker_that_is_killed_or_fails_without_a_word_ends_the_command_with_one_line():
    silent = SimpleNamespace(empty=lambda: True)
    for codes, message in (
        ((None, -9), "^a worker was ended by SIGKILL, as where memory is full; the same command resumes.$"),
        ((1, None), "^a worker failed; its message is above, and the same command resumes.$"),
    ):
        running = [SimpleNamespace(exitcode=code, sentinel=7) for code in codes]
        with pytest.raises(UserError, match=message):
            workers._running(running, silent)
    running = [SimpleNamespace(exitcode=code, sentinel=7) for code in (0, None)]
    assert workers._running(running, silent) == [7]


def test_a_file_that_ends_too_early_is_named_by_the_worker(tmp_path, texts, assets):
    _write(tmp_path / "0.jsonl.gz", texts)
    (tmp_path / "1.jsonl.gz").write_bytes(Path(_write(tmp_path / "x.gz", texts * 9)).read_bytes()[:-900])
    text = TextSource(dataset_path=str(tmp_path / "*.jsonl.gz"), streaming=True)
    with pytest.raises(UserError, match=r"^--dataset-path: .*1.jsonl.gz, line \d+ or later: the comp") as error:
        _tokenize(text, assets, tmp_path / "tokens", num_workers=2)
    assert len(str(error.value).splitlines()) == 1


def test_a_full_disk_while_a_source_is_read_is_no_fault_of_the_source(tmp_path, texts, tokenizer, assets, monkeypatch):
    def rows(_):
        yield {"text": "words"}
        raise RuntimeError("An error occurred while generating the dataset") from OSError(28, "No space", "/cache/x")

    text, folder = TextSource(dataset_path=_write(tmp_path / "text.jsonl", texts)), tmp_path / "tokens"
    (folder / "unfinished").mkdir(parents=True)
    job = open_job(text, str(assets), folder, settings_of(text, str(assets)), 1)
    monkeypatch.setattr(type(job.data), "__iter__", rows)
    with pytest.raises(UserError, match="^/cache/x cannot be used: the disk is full.$"):
        job.write(0, tokenizer)


def test_a_shard_that_is_lost_before_the_end_is_written_again(tmp_path, texts, tokenizer, assets):
    text, folder = TextSource(dataset_path=_write(tmp_path / "text.jsonl", texts)), tmp_path / "tokens"
    (folder / "unfinished").mkdir(parents=True)
    job = open_job(text, str(assets), folder, settings_of(text, str(assets)), 3)
    for shard in range(3):
        job.write(shard, tokenizer)
    (folder / "shard_00002.tokens").unlink()
    with pytest.raises(UserError, match=r"--out .*tokens: a finished shard is gone; the same command writes it again"):
        job.finish({})
    assert (folder / "unfinished").is_dir() and not (folder / "manifest.json").exists()


@pytest.fixture(scope="module")
def corpus(assets, tmp_path_factory):
    """Enough text for some seconds of work."""
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    path.write_text("".join((assets / "train.jsonl").read_text().splitlines(keepends=True)[:150]))
    return path


def _flags(corpus, out):
    return ["--dataset-path", str(corpus), "--tokenizer", "assets/stdlib", "--out", str(out)]


def _run(start, argv):
    """What a command of this project ends with, and what it wrote to stdout."""
    with patch.object(sys, "argv", argv), contextlib.redirect_stdout(io.StringIO()) as written:
        try:
            start()
        except SystemExit as end:
            return end.code, written.getvalue()
    return 0, written.getvalue()


def _script(*arguments):
    path = "scripts/tokenize_data.py"
    return _run(lambda: runpy.run_path(path, run_name="__main__"), [path, *arguments])


@pytest.fixture(scope="module")
def written(corpus, tmp_path_factory):
    """The folder that the command makes, and what it ended with."""
    out = tmp_path_factory.mktemp("written") / "tokens"
    return out, _script(*_flags(corpus, out))


def test_the_command_says_what_it_wrote_and_then_that_it_is_there(written, corpus):
    out, done = written
    what = f"{out}  150 documents, {Manifest.read(out).tokens:,} tokens in 64 shards"
    # A slow machine says between them how far it is.
    said = [line for line in done[1].splitlines() if not line.startswith("shard ")]
    assert (done[0], said) == (0, [f"'{corpus}': 1 file, 150 documents", f"wrote {what}"])
    assert _script(*_flags(corpus, out), "--verify") == (0, f"already there: {what}, verified\n")


def test_a_killed_command_resumes_to_the_same_folder(corpus, written, tmp_path):
    out = tmp_path / "tokens"
    command = subprocess.Popen([sys.executable, "scripts/tokenize_data.py", *_flags(corpus, out), "--workers", "2"])
    while len(list(out.glob("unfinished/shard_*.json"))) < 3:
        assert command.poll() is None
        time.sleep(0.01)
    command.send_signal(signal.SIGSTOP)
    assert _script(*_flags(corpus, out)) == (f"error: --out {out} is in use: another process tokenizes there.", "")
    command.kill()
    assert command.wait() == -9 and not (out / "manifest.json").exists()
    with pytest.raises(UserError, match=r"\[t\] dataset_path = '.*' is not finished: give the command that began it"):
        check_dataset(TextDataLoader.Config(dataset="tokens", dataset_path=str(out)), "t")
    for more, said in (
        (("--text-field", "name"), "--text-field: 'text' -> 'name'"),
        (("--num-shards", "9"), "--num-shards: 64 -> 9"),
        (("--streaming",), "--streaming: False -> True"),
    ):
        expected = f"error: --out {out} holds other tokens: {said}. Choose another --out."
        assert _script(*_flags(corpus, out), *more) == (expected, "")
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tokens")}
    # A file that was lost is no finished shard, whatever the note says.
    (out / "shard_00000.tokens").write_bytes(b"cut")
    status, said = _script(*_flags(corpus, out), "--workers", "2")
    assert status == 0 and "documents\nresumes: " in said and "of 64 shards are there\n" in said and "\nwrote " in said
    assert (out / "shard_00001.tokens").stat().st_mtime_ns == times["shard_00001.tokens"]
    assert _contents(out) == _contents(written[0])


def test_ctrl_c_ends_the_command_and_its_workers_in_one_line(corpus, tmp_path):
    out = tmp_path / "tokens"
    command = [sys.executable, "scripts/tokenize_data.py", *_flags(corpus, out), "--workers", "2"]
    # A terminal sends it to all processes of the command.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0)
    while not list(out.glob("unfinished/shard_*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (130, "interrupted: finished shards are kept; the same command resumes.\n")
    assert list(out.glob("unfinished/shard_*.json")) and not (out / "manifest.json").exists()


def test_a_text_that_was_edited_meanwhile_is_not_resumed(texts, assets, tmp_path):
    path, out = tmp_path / "text.jsonl", tmp_path / "tokens"
    text = TextSource(dataset_path=_write(path, ["one", "two", *texts]))
    # As after a kill: nothing is written yet but the settings.
    with alone_in(out):
        open_job(text, str(assets), out, settings_of(text, str(assets)), 4)
    times = path.stat()
    _write(path, ["one", "too", *texts])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    message = rf"^--out {out} holds other tokens: hash of {path}: '\w{{12}}' -> '\w{{12}}'. Choose another --out.$"
    with pytest.raises(UserError, match=message):
        _tokenize(text, assets, out, num_shards=4)


def test_a_run_from_tokens_has_the_losses_of_the_run_from_text(corpus, written, tmp_path):
    losses, training = [], {"steps": 2, "seq_len": 64, "local_batch_size": 2, "global_batch_size": 2}
    for dataset, path in (("json", corpus), ("tokens", written[0])):
        data = TextDataLoader.Config(dataset=dataset, dataset_path=str(path), shuffle=True)
        config = make_config(tmp_path / dataset, generated_data=False, dataloader=data, training=training)
        train(dataclasses.replace(config, validator=dataclasses.replace(config.validator, enable=False)))
        records = read_records(tmp_path / dataset / "metrics.jsonl")
        losses.append([(record["ntp_loss"], record["nitp_loss"], record["grad_norm"]) for record in records])
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_a_folder_is_known_by_all_of_its_files(written, tmp_path):
    loader = TextDataLoader.Config(dataset="tokens", dataset_path=str(written[0]))
    start = plan_resume(make_config(tmp_path, dataloader=loader))
    known = {name for name in ranks.local_facts(start) if name.startswith(f"content of {written[0]}/")}
    assert known == {f"content of {path}" for path in written[0].iterdir()}


@pytest.fixture
def folder(sources, tmp_path):
    """A copy of a folder of tokens, to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in _contents(Path(sources[1][0].dataset_path)).items():
        (copy / name).write_bytes(content)
    return copy


def _cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-2])


def _in_manifest(**changes):
    def write(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut("shard_00001.tokens"), r": shard_00001.tokens has [\d,]+ bytes and not [\d,]+; copy the folder again"),
        (_cut("documents.offsets"), r": documents.offsets has 206 bytes and not 208; copy"),
        (lambda folder: (folder / "shard_00002.tokens").unlink(), ": shard_00002.tokens is missing; copy"),
        (lambda folder: (folder / "manifest.json").unlink(), " holds no manifest.json, so it is no folder of"),
        (lambda folder: (folder / "manifest.json").write_text("{"), ": its manifest.json is damaged, or of another"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), ": its manifest.json is damaged"),
        (_in_manifest(format=2), ": its manifest.json is damaged, or of another version than format 1"),
        (_in_manifest(dtype="uint32"), ": its manifest.json is damaged"),
        (_in_manifest(vocab_size="many"), ": its manifest.json is damaged"),
        (_in_manifest(tokens=3), ": its manifest.json is damaged"),
        (_in_manifest(shards=[{}]), ": its manifest.json is damaged"),
        (_in_manifest(added=1), ": its manifest.json is damaged"),
    ],
)
def test_an_incomplete_folder_is_one_line_before_anything_is_built(folder, tmp_path, damage, message):
    damage(folder)
    loader = TextDataLoader.Config(dataset="tokens", dataset_path=str(folder))
    config = dataclasses.replace(make_config(tmp_path / "run", generated_data=False), dataloader=loader)
    with pytest.raises(UserError, match=rf"^\[dataloader\] dataset_path = '{folder}'{message}[^\n]*$"):
        config.build()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_path": None}, r"\[t\] dataset_path is missing: dataset = 'tokens' needs a folder"),
        ({"dataset_path": "lost"}, r"\[t\] dataset_path = 'lost' names no folder; `python scripts/tokenize_data.py`"),
        ({"text_field": "body"}, r"\[t\] text_field = 'body' is of text, and '.*' holds tokens: leave it out"),
        ({"streaming": True}, r"\[t\] streaming = True is of text"),
        ({"dataset": "token"}, r"\[t\] dataset = 'token' is neither .* nor 'tokens' .* Did you mean 'tokens'\?"),
        ({"shuffle": True, "dataset": "a/b"}, r"\[t\] shuffle = true, but '.*' is streamed, and only an indexed"),
        ({"shuffle": True, "dataset": "a/b", "streaming": False}, None),
        ({"shuffle": True}, None),
    ],
)
def test_keys_that_tokens_or_a_stream_lack_are_named(sources, options, message):
    path = sources[1][0].dataset_path
    config = TextDataLoader.Config(**{"dataset": "tokens", "dataset_path": path, **options})
    if message is None:
        check_dataset(config, "t")
    else:
        with pytest.raises(UserError, match=message):
            check_dataset(config, "t")


def test_tokens_of_another_tokenizer_are_refused_and_both_are_named(sources, tmp_path):
    _words(tmp_path / "words", 100)
    loader = TextDataLoader.Config(sources=[sources[0][0], sources[1][0]])
    config = dataclasses.replace(
        make_config(tmp_path / "run", generated_data=False), dataloader=loader, hf_assets_path=str(tmp_path / "words")
    )
    with pytest.raises(
        UserError,
        match=r"^\[dataloader\] sources\[1\].dataset_path = '.*' was made with the tokenizer '.*/assets/stdlib' "
        r"\(tokenizer.json: sha256 \w{8}\), but hf_assets_path = '.*/words' holds another \(tokenizer.json: \w+ \w{8}",
    ):
        check_sources(config)


def test_tokens_that_are_damaged_within_are_named_when_they_are_read_or_verified(tokenizer, folder):
    (folder / "shard_00001.tokens").write_bytes(b"\xff" * (folder / "shard_00001.tokens").stat().st_size)
    with pytest.raises(UserError, match=r"dataset_path = '.*copy': shard_00001.tokens or documents.offsets is damaged"):
        _steps(tokenizer, 60, dataset="tokens", dataset_path=str(folder))
    with pytest.raises(UserError, match=r"--out .*copy: shard_00001.tokens is not as it was written"):
        verify(folder, Manifest.read(folder))


@pytest.mark.parametrize("damage", ["descend", "end too late"])
def test_offsets_that_are_damaged_within_are_named_when_they_are_read(tokenizer, folder, damage):
    path = folder / "documents.offsets"
    borders = memoryview(bytearray(path.read_bytes())).cast("q")
    borders[3] = borders[2] - 1 if damage == "descend" else borders[-1] + 5
    path.write_bytes(borders.tobytes())
    with pytest.raises(
        UserError, match=r"dataset_path = '.*copy': shard_0000\d.tokens or documents.offsets is damaged"
    ):
        _steps(tokenizer, 60, dataset="tokens", dataset_path=str(folder))


def test_a_wrong_start_ends_with_one_line(folder, tmp_path, corpus, monkeypatch):
    out = tmp_path / "other"
    out.mkdir()
    (out / "thesis.txt").write_text("kept")
    assert _script(*_flags(corpus, out)) == (f"error: --out {out} holds other files; choose a new folder.", "")
    assert _script(*_flags(corpus, out), "--workers", "0") == ("error: --workers 0: at least 1.", "")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    _cut("shard_00003.tokens")(folder)
    run = ["--recipe", "debug/nitp_debug", "--train-config", "cpu", "--dump_folder", str(tmp_path / "run")]
    data = ["--dataloader.dataset", "tokens", "--dataloader.dataset_path", str(folder)]
    # Both are begun once a process.
    monkeypatch.setattr(torchtitan.train, "init_logger", lambda: None)
    monkeypatch.setattr(structured_logging, "_is_initialized", True)
    status, _ = _run(nitp_titan.train.main, ["train.py", *run, *data])
    assert status.startswith(f"error: [dataloader] dataset_path = '{folder}': shard_00003.tokens has ")
    assert "\n" not in status
