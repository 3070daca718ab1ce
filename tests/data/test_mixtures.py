"""Weighted mixtures of local files: shares, ranks and exact resume."""

import copy
import dataclasses
import gzip
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader

from nitp_titan.data.loader import check_dataset, TextDataLoader
from nitp_titan.data.mixtures import MIXTURES, TextSource
from nitp_titan.data.sources import local_files
from nitp_titan.errors import UserError

SEQ_LEN = 32


class ByteTokenizer:
    """One token per byte, so that a document of 31 bytes is exactly one sequence of 32."""

    def encode(self, text, add_bos, add_eos):
        return [256] * add_bos + list(text.encode()) + [257] * add_eos

    def decode(self, ids):
        return bytes(token for token in ids if token < 256).decode()


def _write(folder, rows, kind="json", num_files=1):
    """Rows as files of the kind in a new folder, dealt out in turn; returns the folder."""
    folder.mkdir()
    for index in range(num_files):
        part = rows[index::num_files]
        lines = "".join(json.dumps(row) + "\n" for row in part)
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{index}.parquet", row_group_size=3)
        elif kind == "json.gz":
            (folder / f"{index}.json.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            (folder / f"{index}.jsonl").write_text(lines)
    return str(folder)


def _documents(letter, count):
    """Documents of one sequence each: a letter and a number in 31 bytes."""
    return [{"text": f"{letter}{index:030}"} for index in range(count)]


def _uneven(letter, count):
    """Documents of a tenth of a sequence to five sequences."""
    return [{"text": f"{letter}{index:05} " + letter * (7 * index % 150)} for index in range(count)]


def _loader(*, world_size=1, rank=0, batch=1, **config):
    options = {"dp_world_size": world_size, "dp_rank": rank, "seq_len": SEQ_LEN, "local_batch_size": batch}
    return TextDataLoader.Config(**config).build(tokenizer=ByteTokenizer(), **options)


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


def _same(left, right):
    pairs = [
        ((a["input"], b["input"]), (a["positions"], b["positions"]), (x, y)) for (a, x), (b, y) in zip(left, right)
    ]
    return len(left) == len(right) and all(torch.equal(*pair) for batch in pairs for pair in batch)


def _texts(batches):
    return [ByteTokenizer().decode(sequence.tolist()) for inputs, _ in batches for sequence in inputs["input"]]


@pytest.fixture
def letters(tmp_path):
    """Sources a, b and c with weights 6, 3 and 1."""
    return [
        TextSource(dataset_path=_write(tmp_path / letter, _documents(letter, 40)), weight=weight)
        for letter, weight in (("a", 6), ("b", 3), ("c", 1))
    ]


def test_the_weights_are_the_shares_of_the_sequences(letters):
    num_sequences = 2000
    texts = _texts(_take(iter(_loader(sources=letters, batch=10)), num_sequences // 10))
    assert all(len(set(text) & set("abc")) == 1 for text in texts)
    counts = Counter(text[0] for text in texts)
    for letter, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        sigma = (num_sequences * share * (1 - share)) ** 0.5
        assert abs(counts[letter] - num_sequences * share) < 4 * sigma


def test_a_seed_gives_one_order_and_each_rank_has_its_own(letters):
    def order(**options):
        return [text[0] for text in _texts(_take(iter(_loader(sources=letters, **options)), 60))]

    assert order(seed=1) == order(seed=1) != order(seed=2)
    assert order(world_size=2, rank=0) != order(world_size=2, rank=1)


@pytest.mark.parametrize("kind", ["json", "json.gz", "parquet"])
@pytest.mark.parametrize(("streaming", "num_files"), [(None, 1), (None, 2), (True, 1), (True, 2)])
def test_two_ranks_share_all_documents_and_have_none_in_common(tmp_path, kind, streaming, num_files):
    rows = _documents("a", 20)
    path = _write(tmp_path / "a", rows, kind, num_files)
    options = {"dataset": kind.split(".")[0], "dataset_path": path, "streaming": streaming, "infinite": False}
    first, second = (_texts(list(_loader(world_size=2, rank=rank, **options))) for rank in (0, 1))
    assert len(first) == len(second) == 10
    assert sorted(first + second) == [row["text"] for row in rows]


@pytest.mark.parametrize("kind", ["json", "json.gz", "parquet"])
@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize("num_sources", [1, 2])
def test_a_loaded_state_gives_the_following_batches_within_and_across_epochs(tmp_path, kind, streaming, num_sources):
    def loader():
        return _loader(sources=sources, batch=2, world_size=2, rank=1)

    sources = [
        TextSource(dataset=kind.split(".")[0], dataset_path=path, weight=weight, streaming=streaming)
        for path, weight in (
            (_write(tmp_path / "a", _uneven("a", 13), kind, 2), 0.8),
            (_write(tmp_path / "b", _uneven("b", 7), kind), 0.2),
        )
    ][:num_sources]
    expected = _take(iter(loader()), 60)
    for taken in (1, 5, 6, 23, 40):
        stopped = loader()
        _take(iter(stopped), taken)
        resumed = loader()
        resumed.load_state_dict(stopped.state_dict())
        assert _same(_take(iter(resumed), 60 - taken), expected[taken:]), taken
    epochs = [stream["document"]["epoch"] for stream in json.loads(stopped.state_dict()["stream_0"])]
    assert min(epochs) >= 1 and len(epochs) == num_sources


@pytest.mark.parametrize("streaming", [None, True])
def test_a_source_unread_between_two_states_keeps_its_place(tmp_path, streaming):
    def loader(state=None):
        made = _loader(sources=sources)
        made.load_state_dict(state or {})
        return made

    paths = [_write(tmp_path / letter, _documents(letter, 50)) for letter in "ab"]
    sources = [
        TextSource(dataset_path=path, weight=weight, streaming=streaming) for path, weight in zip(paths, (0.9, 0.1))
    ]
    expected = _texts(_take(iter(loader()), 40))
    # b is drawn before the first state and after the second, and never between them.
    first = next(index for index, text in enumerate(expected) if text[0] == "b") + 1
    assert {text[0] for text in expected[first : first + 2]} == {"a"} and "b" in {t[0] for t in expected[first + 2 :]}
    one = loader()
    _take(iter(one), first)
    two = loader(one.state_dict())
    _take(iter(two), 2)
    three = loader(two.state_dict())
    assert _texts(_take(iter(three), 40 - first - 2)) == expected[first + 2 :]


@pytest.mark.parametrize("streaming", [None, True])
def test_finite_text_resumes_inside_its_last_document(tmp_path, streaming):
    rows = [{"text": letter * 300} for letter in "ab"]
    options = {"dataset_path": _write(tmp_path / "a", rows), "streaming": streaming, "infinite": False}
    expected = list(_loader(**options))
    # Each document is 301 pairs of tokens: after 11 sequences both are read, and 7 sequences are held.
    assert len(expected) == 19 and 18 * SEQ_LEN < 602 < 19 * SEQ_LEN
    one, two, three = (_loader(**options) for _ in range(3))
    _take(iter(one), 11)
    two.load_state_dict(one.state_dict())
    assert _same(_take(iter(two), 2), expected[11:13])
    three.load_state_dict(two.state_dict())
    assert _same(list(three), expected[13:])


@pytest.mark.parametrize("streaming", [None, True])
def test_a_state_does_not_change_while_its_dataset_reads_on(tmp_path, streaming):
    batches = iter(_loader(dataset_path=_write(tmp_path / "a", _uneven("a", 9)), streaming=streaming).dataset)
    for _ in range(12):
        state = next(batches).state
        before = copy.deepcopy(state)
        next(batches)
        assert state == before


@pytest.mark.parametrize("streaming", [None, True])
def test_a_mixture_resumes_from_a_checkpoint_on_disk(letters, tmp_path, streaming):
    sources = [dataclasses.replace(source, streaming=streaming) for source in letters]
    stopped, resumed = _loader(sources=sources), _loader(sources=sources)
    iterator = iter(stopped)
    _take(iterator, 25)
    dcp.save({"dataloader": stopped}, checkpoint_id=tmp_path / "step-25", no_dist=True)
    dcp.load({"dataloader": resumed}, checkpoint_id=tmp_path / "step-25", no_dist=True)
    assert _same(_take(iter(resumed), 30), _take(iterator, 30))


def test_a_data_worker_gives_the_same_batches_and_resumes(letters):
    expected = _take(iter(_loader(sources=letters)), 20)
    stopped, resumed = _loader(sources=letters, num_workers=1), _loader(sources=letters, num_workers=1)
    assert _same(_take(iter(stopped), 8), expected[:8])
    resumed.load_state_dict(stopped.state_dict())
    assert _same(_take(iter(resumed), 12), expected[8:])


def test_one_source_gives_the_batches_of_torchtitans_own_loader(tmp_path):
    from datasets import load_dataset

    path = _write(tmp_path / "a", _uneven("a", 20))
    DATASETS["stock"] = DatasetConfig(
        path=path,
        loader=lambda path: load_dataset("json", data_files=local_files(path), split="train"),
        sample_processor=lambda document: document["text"],
    )
    options = {"dp_world_size": 1, "dp_rank": 0, "seq_len": SEQ_LEN, "local_batch_size": 3}
    stock = HuggingFaceTextDataLoader.Config(dataset="stock").build(tokenizer=ByteTokenizer(), **options)
    del DATASETS["stock"]
    expected = _take(iter(stock), 30)
    for config in ({"dataset_path": path}, {"sources": [TextSource(dataset_path=path)]}):
        assert _same(_take(iter(_loader(batch=3, **config)), 30), expected)


def test_the_texts_of_several_fields_are_joined_by_an_empty_line(tmp_path):
    rows = [{"problem": "1 + 1?", "hint": "-", "solution": "It is 2, as everyone knows."}] * 2
    path = _write(tmp_path / "a", rows)
    loader = _loader(dataset_path=path, text_field=["problem", "solution"])
    assert _texts(_take(iter(loader), 1))[0].startswith("1 + 1?\n\nIt is 2, as everyone")
    with pytest.raises(UserError, match=r"line 1: there is no field 'solutio'. Did you mean 'solution'"):
        check_dataset(TextDataLoader.Config(dataset_path=path, text_field=["problem", "solutio"]))


def test_a_finite_mixture_ends_with_its_first_source(letters):
    texts = _texts(list(_loader(sources=letters, infinite=False)))
    counts = Counter(text[0] for text in texts)
    assert max(counts.values()) == 40 == counts["a"] and min(counts.values()) < 40


def test_a_mixture_is_used_by_its_name(letters, monkeypatch):
    monkeypatch.setitem(MIXTURES, "letters", letters)
    expected = _take(iter(_loader(sources=letters)), 30)
    assert _same(_take(iter(_loader(mixture="letters")), 30), expected)


def test_registered_mixtures_are_complete_and_checked_without_a_network():
    assert {"c4", "c4_validation", "fineweb_edu", "paper_like"} <= set(MIXTURES)
    for name, sources in MIXTURES.items():
        check_dataset(TextDataLoader.Config(mixture=name))
        assert sum(source.weight for source in sources) == pytest.approx(1)
    assert len(MIXTURES["paper_like"]) == 5
    assert MIXTURES["c4_validation"][0].split == "validation"


def test_sources_are_opened_as_they_are_spelled_out(monkeypatch):
    import datasets

    seen = []

    def load(path, **options):
        seen.append((path, options["name"], options["split"], options["streaming"]))
        fields = {field: ["some words " * 9] for field in ("text", "problem", "generated_solution")}
        return datasets.Dataset.from_dict(fields).to_iterable_dataset()

    monkeypatch.setattr("nitp_titan.data.sources.load_dataset", load)
    _take(iter(_loader(mixture="paper_like")), 100)
    assert seen == [
        ("HuggingFaceFW/fineweb-edu", "sample-350BT", "train", True),
        ("HuggingFaceFW/fineweb-2", "cmn_Hani", "train", True),
        ("common-pile/stackv2_edu_filtered", None, "train", True),
        ("HuggingFaceTB/finemath", "finemath-3plus", "train", True),
        ("nvidia/OpenMathReasoning", None, "cot", True),
    ]
