"""The generated corpus and tokenizer, and the loader of local and Hugging Face text."""

import dataclasses
import json

import httpx
import pytest
import torch
from helpers import make_config
from huggingface_hub.errors import RepositoryNotFoundError
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from nitp_titan.data import assets as stdlib
from nitp_titan.data.loader import check_dataset, check_sources, TextDataLoader
from nitp_titan.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(assets):
    return HuggingFaceTokenizer(HuggingFaceTokenizer.Config(), tokenizer_path=str(assets))


def _loader(tokenizer, **config):
    options = {"dp_world_size": 1, "dp_rank": 0, "seq_len": 64, "local_batch_size": 2}
    return TextDataLoader.Config(**config).build(tokenizer=tokenizer, **options)


def _documents(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_corpus_is_real_text_split_by_document(assets):
    train, validation = (_documents(assets / f"{split}.jsonl") for split in ("train", "validation"))
    names = [document["name"] for document in train + validation]
    assert len(names) == len(set(names)) > 300
    assert {name.partition(":")[0] for name in names} == {"topic", "docstrings", "module"}
    assert (assets / "train.jsonl").stat().st_size > 3e6
    assert all(stdlib.is_validation(document["name"]) for document in validation)
    assert not any(stdlib.is_validation(document["name"]) for document in train)
    assert "module:encodings.cp1252" not in names and "module:json.decoder" in names


def test_near_empty_documents_and_tables_are_left_out():
    prose = "The quick brown fox jumps over the lazy dog. " * 20
    assert stdlib.is_text(prose)
    assert not stdlib.is_text(prose[:100])
    assert not stdlib.is_text("'\\x80'  # 0x80 -> CONTROL CHARACTER OF SOME KIND\n" * 50)
    assert not stdlib.is_text("1, 2, 3, 4, 5, 6, 7, 8\n" * 100)


def test_the_same_python_makes_the_same_bytes_and_a_second_call_does_nothing(assets, tmp_path):
    manifest = stdlib.prepare_stdlib_assets(tmp_path / "again")
    assert manifest.pop("new") is True
    for path in assets.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    (tmp_path / "again/train.jsonl").write_text("kept as it is")
    assert stdlib.prepare_stdlib_assets(tmp_path / "again") == {**manifest, "new": False}
    assert (tmp_path / "again/train.jsonl").read_text() == "kept as it is"


def test_the_tokenizer_is_lossless_with_bos_and_eos(tokenizer):
    text = "def naïve(x):\n\treturn x ** 2  # ∑ 中文\n"
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode(ids[1:-1]) == text
    assert tokenizer.get_vocab_size() == 4096


def test_documents_are_packed_and_positions_restart_with_each(tokenizer, tmp_path):
    texts = ["def f(x):\n    return x\n" * 6, "import os\n" * 30, "class A:\n    pass\n" * 20]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    loader = _loader(tokenizer, dataset_path=str(path), text_field="body", infinite=False)
    inputs, labels = next(iter(loader))
    tokens = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in texts]
    stream = [(document[i], i, document[i + 1]) for document in tokens for i in range(len(document) - 1)]
    expected = torch.tensor(stream[:128]).reshape(2, 64, 3)
    assert torch.equal(inputs["input"], expected[..., 0])
    assert torch.equal(labels, expected[..., 2])
    starts = (inputs["positions"] == 0) == (expected[..., 1] == 0)
    starts[1, 0] = True  # A sequence that opens inside a document counts from 0 again.
    assert starts.all()


def test_folders_and_patterns_name_all_their_files(tokenizer, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} " * 400}) + "\n")
    firsts = {
        str(next(iter(_loader(tokenizer, dataset_path=path)))[0]["input"].tolist())
        for path in (str(tmp_path), str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl"))
    }
    assert len(firsts) == 1


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (None, {}, r"\[dataloader\] dataset_path = '.*mine.jsonl' names no file"),
        ("", {"dataset_path": None}, r"\[dataloader\] dataset_path is missing"),
        ('{"txt": "x"}\n', {}, r"text_field = 'text': .*, line 1: there is no field 'text'. Did you mean 'txt'"),
        ('{"text": 3}\n', {}, r"dataset_path: .*, line 1: 'text' is 3 and not a text"),
        ("plain text\n", {}, r"mine.jsonl, line 1: no JSON object but 'plain text'"),
        ("", {}, r"dataset_path = '.*mine.jsonl' holds no document"),
    ],
)
def test_a_wrong_path_or_field_is_named(tmp_path, lines, options, message):
    path = tmp_path / "mine.jsonl"
    if lines is not None:
        path.write_text(lines)
    with pytest.raises(UserError, match=message):
        check_dataset(TextDataLoader.Config(**{"dataset_path": str(path), **options}))


def test_missing_assets_are_named_before_anything_is_built(assets, tmp_path):
    config = make_config(tmp_path, generated_data=False)
    for changes, message in (
        ({"hf_assets_path": str(tmp_path)}, "hf_assets_path = '.*' holds no tokenizer.json"),
        (
            {"dataloader": TextDataLoader.Config(dataset_path="lost.jsonl")},
            r"\[dataloader\] dataset_path = 'lost.jsonl'",
        ),
        (
            {"validator": dataclasses.replace(config.validator, dataloader=TextDataLoader.Config(dataset_path="x"))},
            r"\[validator.dataloader\] dataset_path = 'x' names no file",
        ),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(config, **changes).build()
    assert not (tmp_path / "resolved.toml").exists()


def test_a_start_says_what_it_reads_and_what_it_leaves_out(tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("a.jsonl", "b.jsonl", "c.jsonl.zst"):
        (tmp_path / name).write_text('{"text": "some words"}\n')
    _loader(tokenizer, dataset_path=str(tmp_path))
    assert [message for message in caplog.messages if message.startswith(f"[dataloader] '{tmp_path}'")] == [
        f"[dataloader] '{tmp_path}': 2 files, 2 documents",
        f"[dataloader] '{tmp_path}': not read: {tmp_path}/c.jsonl.zst (of another ending, or a dead link)",
    ]


def test_validation_on_a_text_of_training_is_warned_of(assets, tmp_path, caplog):
    caplog.set_level("WARNING")
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((assets / "train.jsonl").read_bytes())
    config = make_config(tmp_path, generated_data=False)
    train, hub = str(assets / "train.jsonl"), {"dataset": "owner/name"}
    for training, validation, expected in (
        ({"dataset_path": train}, {"dataset_path": str(assets / "validation.jsonl")}, None),
        ({"dataset_path": train}, {"dataset_path": str(copy)}, copy),
        ({"dataset_path": str(tmp_path)}, {"dataset_path": train, "streaming": True}, train),
        (hub, {**hub, "split": "validation"}, None),
        (hub, hub, "owner/name"),
    ):
        caplog.clear()
        loader = TextDataLoader.Config(**validation)
        validator = dataclasses.replace(config.validator, enable=True, dataloader=loader)
        check_sources(dataclasses.replace(config, dataloader=TextDataLoader.Config(**training), validator=validator))
        said = [message for message in caplog.messages if "which [dataloader] trains on" in message]
        assert len(said) == (expected is not None) and all(f"reads '{expected}'" in message for message in said)


def test_a_document_without_text_in_the_middle_is_named(tokenizer, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "good"}\n{"other": "bad"}\n')
    with pytest.raises(UserError, match=r"mine.jsonl, line 2: there is no field 'text'. Choose from: other."):
        next(iter(_loader(tokenizer, dataset_path=str(path), infinite=False)))


def test_a_hugging_face_dataset_is_opened_by_name_and_a_failure_is_one_line(tokenizer, monkeypatch):
    import datasets

    seen, request = {}, httpx.Request("GET", "https://hub")

    def load(path, **options):
        seen.update(path=path, **options)
        if path == "someone/away":
            raise ConnectionError("offline\nand a long story")
        if path == "someone/wrong":
            raise ValueError("no such split\nand a long story")
        if path == "someone/gone":
            raise RepositoryNotFoundError("404\nand a long story", response=httpx.Response(404, request=request))
        if path == "someone/large":
            cause = OSError(28, "No space left on device", "/cache/hf/x.arrow")
            raise RuntimeError("An error occurred while generating the dataset") from cause
        rows = datasets.Dataset.from_dict({"content": ["some words " * 200]})
        return rows.to_iterable_dataset()

    monkeypatch.setenv("HF_HOME", "/cache/hf")
    monkeypatch.setattr("nitp_titan.data.sources.load_dataset", load)
    loader = _loader(tokenizer, dataset="someone/Corpus", subset="en", split="validation", text_field="content")
    assert next(iter(loader))[0]["input"].shape == (2, 64)
    assert seen == {"path": "someone/Corpus", "name": "en", "split": "validation", "streaming": True}
    for name, message in (
        ("someone/away", r"^someone/away: it does not answer \(ConnectionError: offline\)\.$"),
        ("someone/large", r"^the cache /cache/hf/x.arrow cannot be used: the disk is full\. HF_HOME names another"),
        ("someone/wrong", r"dataset = 'someone/wrong' .* could not be opened: ValueError: no such split$"),
        # What a server says of a name is about the setting that gives the name.
        ("someone/gone", r"^\[dataloader\] dataset = 'someone/gone' .* could not be opened: RepositoryNotFoundError"),
    ):
        with pytest.raises(UserError, match=message):
            _loader(tokenizer, dataset=name)


def test_a_loader_continues_where_its_state_was_taken(tokenizer, assets):
    loader = _loader(tokenizer, dataset_path=str(assets / "train.jsonl"))
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    expected = next(iterator)[0]["input"]
    again = _loader(tokenizer, dataset_path=str(assets / "train.jsonl"))
    again.load_state_dict(state)
    assert torch.equal(next(iter(again))[0]["input"], expected)


def test_a_document_that_datasets_cannot_read_is_one_line(tokenizer, monkeypatch):
    import datasets

    def rows():
        yield {"text": "some words " * 9}
        raise ValueError("Couldn't cast\nand a long story")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr("nitp_titan.data.sources.load_dataset", lambda *arguments, **options: stream)
    loader = _loader(tokenizer, dataset="owner/name", infinite=False)
    with pytest.raises(UserError, match=r"^'owner/name' cannot be read: \w+: [^\n]*$"):
        list(loader)
    bad = datasets.Dataset.from_dict({"text": [None], "id": ["doc-7"]}).to_iterable_dataset()
    monkeypatch.setattr("nitp_titan.data.sources.load_dataset", lambda *arguments, **options: bad)
    with pytest.raises(UserError, match=r"a document of 'owner/name', .*'doc-7'.*: 'text' is null and not a text"):
        list(_loader(tokenizer, dataset="owner/name", infinite=False))
