"""One order of sequences on any number of ranks: states of one number of ranks continue on another."""

import hashlib
import json
from collections import Counter
from glob import glob
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp
from datasets import IterableDataset
from simulated_ranks import SimulatedRanks
from test_mixtures import _documents, _loader, _take, _texts, _uneven, _write

from nitp_titan import config_registry
from nitp_titan.data import text_sets
from nitp_titan.data.mixtures import TextSource
from nitp_titan.errors import UserError

GLOBAL_BATCH = 12
RANKS = (1, 2, 3, 4)


class _World:
    """The loaders of all data-parallel ranks, which train a global batch per step."""

    def __init__(self, num_ranks, *, global_batch=GLOBAL_BATCH, microbatches=1, state=None, **config):
        batch = global_batch // num_ranks // microbatches
        self.loaders = [_loader(world_size=num_ranks, rank=rank, batch=batch, **config) for rank in range(num_ranks)]
        for loader in self.loaders:
            if state is not None:
                # A rank asks a checkpoint for its own parts.
                loader.load_state_dict({key: state[key] for key in loader.state_dict()})
        self._iterators, self._microbatches = [iter(loader) for loader in self.loaders], microbatches

    def step(self):
        """Hashes of the sequences of a step: tokens, labels and positions."""
        batches = [next(iterator) for _ in range(self._microbatches) for iterator in self._iterators]
        return Counter(
            hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in sequence)).hexdigest()
            for inputs, labels in batches
            for sequence in zip(inputs["input"], inputs["positions"], labels)
        )

    def state(self):
        """What a checkpoint holds: the states of all ranks together, which agree where they overlap."""
        merged = {}
        for loader in self.loaders:
            state = loader.state_dict()
            assert all(merged.get(key, value) == value for key, value in state.items())
            merged |= state
        return merged


def _sources(tmp_path, streaming, num_files=1, count=37):
    return [
        TextSource(
            dataset_path=_write(tmp_path / letter, _uneven(letter, count), num_files=num_files),
            weight=weight,
            streaming=streaming,
        )
        for letter, weight in (("a", 0.7), ("b", 0.3))
    ]


@pytest.mark.parametrize("num_streams", [1, 2, 4, 6])
@pytest.mark.parametrize(("streaming", "num_files"), [(None, 1), (True, 1), (True, 6)])
def test_every_number_of_ranks_trains_the_same_sequences_in_every_step(tmp_path, num_streams, streaming, num_files):
    config = {"sources": _sources(tmp_path, streaming, num_files), "num_streams": num_streams}
    one = _World(1, **config)
    worlds = [_World(ranks, **config) for ranks in RANKS[1:]] + [_World(2, microbatches=3, **config)]
    for _ in range(20):
        expected = one.step()
        assert all(world.step() == expected for world in worlds)
        assert all(world.state() == one.state() for world in worlds)
    epochs = {stream["document"]["epoch"] for streams in _streams(one.state()) for stream in streams}
    assert max(epochs) >= 1


def _streams(state):
    return [json.loads(value) for key, value in state.items() if key.startswith("stream_")]


@pytest.mark.parametrize("num_streams", [1, 4])
@pytest.mark.parametrize(("streaming", "num_files"), [(None, 1), (True, 4)])
def test_a_run_resumes_on_other_ranks_without_a_lost_or_repeated_sequence(tmp_path, num_streams, streaming, num_files):
    config = {"sources": _sources(tmp_path, streaming, num_files), "num_streams": num_streams}
    whole = _World(1, **config)
    expected = [whole.step() for _ in range(18)]
    for path in ((1, 2, 4, 1, 3), (4, 1, 2), (3, 2, 1)):
        state, steps = None, []
        for ranks in path:
            world = _World(ranks, state=state, **config)
            steps += [world.step() for _ in range(18 // len(path))]
            # As a checkpoint on disk would give it back.
            state = json.loads(json.dumps(world.state()))
        assert steps == expected[: len(steps)], path


@pytest.mark.parametrize(("streaming", "num_files"), [(None, 1), (True, 5), (True, 70)])
def test_a_recipe_has_one_order_with_every_train_config_and_resumes_with_any(tmp_path, streaming, num_files):
    recipe, ranks = "moe/ntp_3b_a0.5b", {"h100x8": 8, "h100x64_ep": 64}
    streams = {name: config_registry.load(f"{recipe}@{name}").dataloader.num_streams for name in ranks}
    assert streams == {"h100x8": 64, "h100x64_ep": 64}
    sources = _sources(tmp_path, streaming, num_files, count=150)
    config = {"sources": sources, "num_streams": 64, "global_batch": 128}
    whole = _World(1, **config)
    expected = [whole.step() for _ in range(6)]
    for path in (("h100x8", "h100x64_ep", "h100x8"), ("h100x64_ep", "h100x8", "h100x64_ep")):
        state, steps = None, []
        for name in path:
            world = _World(ranks[name], state=state, **config)
            steps += [world.step() for _ in range(2)]
            state = json.loads(json.dumps(world.state()))
        assert steps == expected, path
    assert max(stream["document"]["epoch"] for streams in _streams(state) for stream in streams) >= 1


@pytest.mark.parametrize(
    ("streaming", "before", "after"),
    [
        (None, [40], [60]),
        (None, [20, 20], [20, 20, 20]),
        (True, [40], [60]),
        (True, [20], [20, 20, 20]),
        (True, [20, 20], [20, 30]),
        (True, [20] * 4, [20] * 8),
        (True, [20] * 4, [20, 20, 20, 30]),
    ],
)
def test_what_is_added_at_the_end_changes_nothing_before_it(tmp_path, streaming, before, after):
    """In the first epoch; documents in each file, of one sequence each."""
    for folder, sizes in (("old", before), ("new", after)):
        (tmp_path / folder).mkdir()
        for number, size in enumerate(sizes):
            rows = _documents(chr(97 + number), size)
            (tmp_path / folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    old, new = (
        _texts(_take(iter(_loader(dataset_path=str(tmp_path / name), num_streams=4, streaming=streaming)), sum(before)))
        for name in ("old", "new")
    )
    assert len(set(old)) == sum(before) and old == new


def test_a_later_epoch_continues_though_the_text_grew_and_another_document_is_there(tmp_path):
    """A later epoch is shuffled over all documents: a long one was cut, and a short one takes its place."""
    path = tmp_path / "text.jsonl"
    text = _documents("a", 1)[0]["text"]
    path.write_text(json.dumps({"text": text * 7}) + "\n")
    loader = _loader(dataset_path=str(path), batch=1)
    batches = iter(loader)
    for _ in range(40):
        next(batches)
        (stream,) = _streams(loader.state_dict())[0]
        if stream["document"]["epoch"] and stream["offset"] > 20:
            break
    state = loader.state_dict()
    path.write_text(json.dumps({"text": "b"}) + "\n")
    changed = _loader(dataset_path=str(path), batch=1)
    changed.load_state_dict(state)
    inputs, _ = next(iter(changed))
    assert stream["offset"] > 20 and inputs["positions"].max() < 20


def test_a_rank_reads_a_streamed_source_of_few_files_once_for_all_its_streams(monkeypatch):
    """Not once for each of them; what other streams have not come to waits."""
    rows, read = _uneven("a", 200), []

    def documents():
        for row in rows:
            read.append(row["text"])
            yield row

    source = IterableDataset.from_generator(documents)
    monkeypatch.setattr("nitp_titan.data.sources.load_dataset", lambda *args, **options: source)
    for num_ranks, rank in ((1, 0), (4, 3)):
        read.clear()
        loader = _loader(
            dataset="owner/name", num_streams=64, infinite=False, world_size=num_ranks, rank=rank, batch=64 // num_ranks
        )
        batches = list(loader)
        assert read == [row["text"] for row in rows], num_ranks
        texts = "".join(_texts([({"input": inputs["input"][labels != -100][None]}, 0) for inputs, labels in batches]))
        own = [row["text"] for number, row in enumerate(rows) if number % 64 % num_ranks == rank]
        assert sorted(texts) == sorted("".join(own))


@pytest.mark.parametrize(("num_files", "groups"), [(1, 1), (4, 4), (5, 1), (8, 8), (16, 8)])
def test_a_rank_reads_only_its_own_files_of_a_streamed_source_where_they_can_be_dealt(
    tmp_path, monkeypatch, num_files, groups
):
    rows = _uneven("a", 96)
    folder = _write(tmp_path / "text", rows, num_files=num_files)
    opened, read_file = [], text_sets.read_file

    def counting(file, *arguments, **options):
        opened.append(file)
        return read_file(file, *arguments, **options)

    monkeypatch.setattr(text_sets, "read_file", counting)
    texts = ""
    for rank in range(4):
        opened.clear()
        loader = _loader(
            dataset_path=folder, streaming=True, num_streams=8, infinite=False, world_size=4, rank=rank, batch=2
        )
        texts += "".join(_texts([({"input": inputs["input"][labels != -100][None]}, 0) for inputs, labels in loader]))
        parts = {rank % groups, (rank + 4) % groups}
        assert sorted(opened) == [path for n, path in enumerate(sorted(glob(f"{folder}/*"))) if n % groups in parts]
    assert sorted(texts) == sorted("".join(row["text"] for row in rows))


@pytest.mark.parametrize("num_streams", [1, 3])
def test_an_epoch_holds_every_token_of_every_document_once(tmp_path, num_streams):
    rows = _documents("a", 24)
    world = _World(2, dataset_path=_write(tmp_path / "a", rows), num_streams=num_streams)
    for epoch in range(3):
        texts = [text for _ in range(2) for iterator in world._iterators for text in _texts([next(iterator)])]
        assert sorted(texts) == [row["text"] for row in rows], epoch


def test_epochs_after_the_first_are_shuffled(tmp_path):
    rows = _documents("a", 24)
    world = _World(1, dataset_path=_write(tmp_path / "a", rows))
    orders = [[text for _ in range(2) for text in _texts([next(world._iterators[0])])] for _ in range(3)]
    assert orders[0] == [row["text"] for row in rows]
    assert all(left != right for left, right in pairwise(orders))


def test_a_rank_reads_its_own_streams_only_where_ranks_divide_them(tmp_path):
    path = _write(tmp_path / "a", _documents("a", 24))
    read = {
        (ranks, streams): [
            list(loader.dataset.streams) for loader in _World(ranks, dataset_path=path, num_streams=streams).loaders
        ]
        for ranks, streams in ((2, 4), (4, 4), (2, 1), (3, 4), (4, 6))
    }
    assert read[2, 4] == [[0, 2], [1, 3]]
    assert read[4, 4] == [[0], [1], [2], [3]]
    assert read[2, 1] == [[0], [0]]
    assert read[3, 4] == [[0, 1, 2, 3]] * 3
    assert read[4, 6] == [[0, 2, 4], [1, 3, 5]] * 2


def test_ranks_that_read_what_others_train_are_told(tmp_path, caplog):
    caplog.set_level("WARNING")
    path = _write(tmp_path / "a", _documents("a", 24))
    for ranks, streams in ((1, 1), (2, 4), (4, 4)):
        _World(ranks, dataset_path=path, num_streams=streams)
    assert not caplog.messages
    _World(3, dataset_path=path, num_streams=4)
    assert caplog.messages == [
        "[dataloader] num_streams = 4 is not a multiple of 3 data-parallel ranks: for [dataloader], each of them also "
        "reads and tokenizes the streams of other ranks."
    ]


def _together(loaders):
    """Batches of simulated ranks that end together, as `NITPTrainer` lets its ranks."""
    ranks, group = [iter(loader) for loader in loaders], SimulatedRanks(len(loaders))
    for rank, loader in enumerate(loaders):
        loader.any_rank = lambda found, rank=rank: bool(group.largest(rank, found))
    return group.run([lambda iterator=iterator: list(iterator) for iterator in ranks])


@pytest.mark.parametrize("num_streams", [1, 2, 6])
@pytest.mark.parametrize("count", [24, 25, 26, 27])
def test_finite_data_ends_on_all_ranks_at_the_same_batch(tmp_path, count, num_streams):
    """Nothing is left out, and the rows that fill up a rank's last batch have no label."""
    rows = _documents("a", count)
    config = {
        "dataset_path": _write(tmp_path / "a", rows),
        "infinite": False,
        "batch": 4,
        "num_streams": num_streams,
    }
    ranks = _together([_loader(world_size=3, rank=rank, **config) for rank in range(3)])
    shapes = [[tuple(labels.shape) for _, labels in batches] for batches in ranks]
    assert shapes[0] == shapes[1] == shapes[2]
    texts = []
    for inputs, labels in (batch for batches in ranks for batch in batches):
        trained = (labels != -100).any(1)
        assert torch.equal(trained, (labels != -100).all(1))
        texts += _texts([({"input": inputs["input"][trained]}, None)])
    assert sorted(texts) == [row["text"] for row in rows]


def test_a_document_is_as_long_as_it_likes(tmp_path):
    path = tmp_path / "long.jsonl"
    text = "".join(chr(97 + index % 26) for index in range(1000))
    path.write_text(json.dumps({"text": text}) + "\n")
    batches = list(_loader(dataset_path=str(path), infinite=False))
    real = torch.cat([inputs["input"][labels != -100] for inputs, labels in batches])
    assert _texts([({"input": real[None]}, None)]) == [text]
    assert all(torch.equal(inputs["positions"][0], torch.arange(32)) for inputs, _ in batches[:-1])
    # The document's last 9 tokens, then what only fills the sequence up.
    assert torch.equal(batches[-1][0]["positions"][0], torch.cat([torch.arange(9), torch.arange(23)]))
    assert (batches[-1][1][0] != -100).tolist() == [True] * 9 + [False] * 23


@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize("num_streams", [1, 4])
def test_finite_data_in_streams_resumes_on_other_ranks_to_its_end(tmp_path, streaming, num_streams):
    """Some streams of a mixture end long before others; every label is there once."""
    config = {"sources": _sources(tmp_path, streaming, count=17), "num_streams": num_streams, "infinite": False}
    config |= {"batch": 2}
    whole = list(_loader(**config | {"batch": 4}))
    expected = [labels[labels != -100].tolist() for _, labels in whole]
    found, state = [], {}
    for num_ranks, num_steps in ((2, 2), (1, 2), (2, None)):
        loaders = [_loader(world_size=num_ranks, rank=rank, **config) for rank in range(num_ranks)]
        for loader in loaders:
            loader.load_state_dict({key: state[key] for key in loader.state_dict()} if state else {})
        if num_steps is None:
            steps = list(zip(*_together(loaders)))
        else:
            iterators = [iter(loader) for loader in loaders]
            steps = [[next(iterator) for iterator in iterators] for _ in range(num_steps)]
        for step in steps:
            rows = [row for rows in zip(*(labels for _, labels in step)) for row in rows]
            found += [label for row in rows for label in row[row != -100].tolist()]
        state = {key: value for loader in loaders for key, value in loader.state_dict().items()}
    assert found == [label for labels in expected for label in labels]


@pytest.mark.parametrize("streaming", [None, True])
def test_a_stream_without_text_is_named_instead_of_read_forever(tmp_path, streaming):
    path = _write(tmp_path / "a", _documents("a", 3))
    with pytest.raises(UserError, match=r"dataset_path = '.*', stream 4 of num_streams = 4, holds no text"):
        _loader(dataset_path=path, num_streams=4, batch=4, streaming=streaming).__iter__().__next__()


def test_the_state_on_disk_is_text_and_numbers(tmp_path):
    loader = _loader(sources=_sources(tmp_path, True), num_streams=2)
    next(iter(loader))
    dcp.save({"dataloader": loader}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    saved = dcp.FileSystemReader(tmp_path / "step-1").read_metadata().state_dict_metadata
    assert sorted(saved) == [f"dataloader.{key}" for key in ("num_streams", "sequence", "stream_0", "stream_1")]
    assert {type(value) for value in loader.state_dict().values()} == {int, str}


def test_a_state_of_other_data_is_refused(tmp_path):
    sources = _sources(tmp_path, None)
    state = _loader(sources=sources, num_streams=2).state_dict()
    with pytest.raises(UserError, match=r"num_streams = 4, but the checkpoint's data is in 2 streams"):
        _loader(sources=sources, num_streams=4).load_state_dict(state)
    with pytest.raises(UserError, match=r"\[dataloader\] has 1 sources, but the checkpoint's data has 2"):
        _loader(sources=sources[:1], num_streams=2).load_state_dict(state)
