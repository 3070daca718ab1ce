"""One order of sequences on any number of ranks: states of one number of ranks continue on another."""

import hashlib
import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_mixtures import _documents, _loader, _texts, _uneven, _write

from nitp_titan.config import UserError
from nitp_titan.data.mixtures import TextSource

GLOBAL_BATCH = 12
RANKS = (1, 2, 3, 4)


class _World:
    """The loaders of all data-parallel ranks, which train a global batch per step."""

    def __init__(self, num_ranks, *, microbatches=1, state=None, **config):
        batch = GLOBAL_BATCH // num_ranks // microbatches
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
def test_a_run_goes_on_on_other_ranks_without_a_lost_or_repeated_sequence(tmp_path, num_streams, streaming, num_files):
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


def test_a_rank_reads_its_own_parts_only_where_ranks_divide_them(tmp_path):
    path = _write(tmp_path / "a", _documents("a", 24))
    read = {
        (ranks, shards): [
            list(loader.dataset.streams) for loader in _World(ranks, dataset_path=path, num_streams=shards).loaders
        ]
        for ranks, shards in ((2, 4), (4, 4), (2, 1), (3, 4), (4, 6))
    }
    assert read[2, 4] == [[0, 2], [1, 3]]
    assert read[4, 4] == [[0], [1], [2], [3]]
    assert read[2, 1] == [[0], [0]]
    assert read[3, 4] == [[0, 1, 2, 3]] * 3
    assert read[4, 6] == [[0, 2, 4], [1, 3, 5]] * 2


def test_ranks_that_read_what_others_train_are_told(tmp_path, caplog):
    caplog.set_level("WARNING")
    path = _write(tmp_path / "a", _documents("a", 24))
    for ranks, shards in ((1, 1), (2, 4), (4, 4)):
        _World(ranks, dataset_path=path, num_streams=shards)
    assert not caplog.messages
    _World(3, dataset_path=path, num_streams=4)
    assert set(caplog.messages) == {
        "[dataloader] num_streams = 4 is not a multiple of 3 data-parallel ranks: for [dataloader], each of them also "
        "reads and tokenizes what is of others."
    }


@pytest.mark.parametrize("count", [24, 25, 26, 27])
def test_finite_data_ends_on_all_ranks_at_the_same_batch(tmp_path, count):
    """Nothing is left out, and the rows that fill up a rank's last batch have no label."""
    rows = _documents("a", count)
    config = {"dataset_path": _write(tmp_path / "a", rows), "infinite": False, "batch": 4}
    ranks = [list(_loader(world_size=3, rank=rank, **config)) for rank in range(3)]
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
def test_a_part_without_text_is_named_instead_of_read_forever(tmp_path, streaming):
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


