"""Documents of text sources, packed into one order of sequences that does not depend on the number of ranks.

The order is that of one endless row of sequences 0, 1, 2, ...: sequence ``j`` comes from shard ``j % num_shards`` of a
source that a seeded draw chooses for it, and is trained by data-parallel rank ``j % num_ranks``. A rank reads the
shards that hold its sequences and passes over the sequences of the others, so ranks share no work where ``num_shards``
is a multiple of their number. How far every shard is read after a number of sequences follows from that number alone:
a state taken on some ranks continues on any other number of them, with no sequence lost and none repeated.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools.logging import logger

# Of the shuffle of every epoch, plus its number; TorchTitan's text datasets have the same.
_SHUFFLE_SEED = 42


class PackedSequence(NamedTuple):
    """Tokens, their successors within their documents and positions that restart with each; all [length], int64."""

    tokens_L: Tensor
    labels_L: Tensor
    positions_L: Tensor


class Batch(NamedTuple):
    """One batch of a rank and the state of the data after it.

    ``inputs`` holds ``input`` and ``positions``, [batch, length]; ``labels`` is [batch, length].
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    state: dict[str, Any]


class Documents:
    """Documents of one shard of a source, epoch after epoch; an indexed source is shuffled, by default from the second.

    Args:
        source: an indexed or a streamed data set of Hugging Face ``datasets``.
        shard, num_shards: which part of it.
        state: from `state`, to go on from; None for the beginning.
        shuffle: whether an indexed source is shuffled in the first epoch too.
    """

    def __init__(
        self,
        source: Dataset | IterableDataset,
        shard: int,
        num_shards: int,
        state: dict[str, Any] | None,
        *,
        shuffle: bool = False,
    ):
        self._shuffle = shuffle
        if isinstance(source, Dataset):
            self._source = source.shard(num_shards, shard) if shard < len(source) else source.select(range(0))
        elif source.num_shards >= num_shards:
            self._source = source.shard(num_shards, shard)
        else:
            # Fewer files than shards: each reads all of them and keeps its share of the documents.
            self._source = split_dataset_by_node(source, shard, num_shards)
        self.epoch = state["epoch"] if state else 0
        # Documents read of an indexed source; of a streamed one its own state, None before the first document.
        self._read: Any = state["read"] if state else self._unread
        self._rows = self._iterator()

    @property
    def _unread(self) -> int | None:
        return 0 if isinstance(self._source, Dataset) else None

    def _iterator(self) -> Iterator[dict[str, Any]]:
        if isinstance(self._source, Dataset):
            shuffled = self._shuffle or self.epoch > 0
            source = self._source.shuffle(seed=_SHUFFLE_SEED + self.epoch) if shuffled else self._source
            return iter(source.skip(self._read)) if self._read < len(source) else iter(())
        # A state that was loaded counts for its own epoch only.
        self._source.set_epoch(self.epoch)
        if self._read is not None:
            self._source.load_state_dict(self._read)
        return iter(self._source)

    def next(self) -> dict[str, Any] | None:
        """The next document; None at the end of an epoch."""
        document = next(self._rows, None)
        if document is not None:
            self._read = self._read + 1 if isinstance(self._source, Dataset) else self._source.state_dict()
        return document

    def start_epoch(self) -> None:
        """Begin again with the first document."""
        self.epoch += 1
        self._read = self._unread
        self._rows = self._iterator()

    def state(self) -> dict[str, Any]:
        """Where the next document is: plain numbers, strings, lists and tables."""
        return {"epoch": self.epoch, "read": self._read}


class _Pending(NamedTuple):
    """A document of which some tokens are not yet packed."""

    state: dict[str, Any]
    tokens: Tensor


class Stream:
    """Packed sequences of one shard of one source.

    The state is a document and an offset into it, not tokens: what is in between is read again.

    Args:
        documents: makes the documents from a state, or from the beginning.
        tokens_of: tokens of a document, with those that begin and end it.
        seq_len: tokens per sequence.
        infinite: whether to begin again at the end.
        name: what the log calls it.
        empty: raised where endless data has no token.
        state: from `state`, to go on from; None for the beginning.
    """

    def __init__(
        self,
        documents: Callable[[dict[str, Any] | None], Documents],
        tokens_of: Callable[[dict[str, Any]], list[int] | Tensor],
        *,
        seq_len: int,
        infinite: bool,
        name: str,
        empty: Exception,
        state: dict[str, Any] | None,
    ):
        self._documents = documents(state and state["document"])
        self._tokens_of = tokens_of
        self._seq_len, self._infinite, self._name, self._empty = seq_len, infinite, name, empty
        self._pending: deque[_Pending] = deque()
        # Of the first pending document, the predicted tokens that are packed already.
        self._offset = state["offset"] if state else 0
        self._num_tokens = -self._offset
        # Whether this epoch had a token; of one that is gone on with it is not known.
        self._found_any = state is not None

    def next(self) -> PackedSequence | None:
        """The next sequence; None at the end of finite data, of which less than a sequence may be left.

        Raises:
            Exception: ``empty``, if a whole epoch of endless data has no token.
        """
        while self._num_tokens < self._seq_len:
            if not self._read_document():
                return None
        return self._pack(self._seq_len)

    def remainder(self) -> PackedSequence | None:
        """What finite data leaves over at its end: a shorter sequence, which training drops; None if there is none."""
        return self._pack(self._num_tokens) if self._num_tokens > 0 else None

    def _read_document(self) -> bool:
        state = self._documents.state()
        document = self._documents.next()
        if document is None:
            if not self._infinite:
                return False
            if not self._found_any:
                raise self._empty
            self._found_any = False
            self._documents.start_epoch()
            logger.info(f"{self._name} is read again from its beginning (epoch {self._documents.epoch})")
            return True
        tokens = torch.as_tensor(self._tokens_of(document), dtype=torch.int64)
        if len(tokens) > 1:
            self._found_any = True
            self._pending.append(_Pending(state, tokens))
            self._num_tokens += len(tokens) - 1
        return True

    def _pack(self, length: int) -> PackedSequence:
        tokens, labels, positions = [], [], []
        while length:
            document = self._pending[0].tokens
            start = self._offset
            end = min(start + length, len(document) - 1)
            tokens.append(document[start:end])
            labels.append(document[start + 1 : end + 1])
            # A document that was cut starts at 0 again: positions stay within the sequence.
            positions.append(torch.arange(end - start))
            length -= end - start
            self._num_tokens -= end - start
            self._offset = end
            if end == len(document) - 1:
                self._pending.popleft()
                self._offset = 0
        return PackedSequence(torch.cat(tokens), torch.cat(labels), torch.cat(positions))

    def state(self) -> dict[str, Any]:
        """Where the next sequence starts."""
        document = self._pending[0].state if self._pending else self._documents.state()
        return {"document": document, "offset": self._offset}


class PackedText(torch.utils.data.IterableDataset):
    """Batches of one data-parallel rank, each with the state after it.

    Args:
        open_stream: makes the stream of a source and a shard from a state, or from the beginning.
        weights: share of each source in the sequences.
        seed: of the draw of sources.
        num_shards: parts that each source is read in. Finite data ends with the first source that does and needs one
            shard, so that all ranks see the end at the same batch.
        seq_len: tokens per sequence.
        batch_size: sequences per batch of this rank.
        rank, num_ranks: which of all batches.
    """

    def __init__(
        self,
        open_stream: Callable[[int, int, dict[str, Any] | None], Stream],
        *,
        weights: Sequence[float],
        seed: int,
        num_shards: int,
        seq_len: int,
        batch_size: int,
        rank: int,
        num_ranks: int,
    ):
        self._open_stream = open_stream
        self._weights, self._seed, self._seq_len = list(weights), seed, seq_len
        self._batch_size, self._rank, self._num_ranks = batch_size, rank, num_ranks
        self.num_shards = num_shards
        step = math.gcd(num_ranks, num_shards)
        self.shards = range(rank % step, num_shards, step)
        """Shards that hold sequences of this rank."""
        self.start: dict[str, Any] = {"sequence": 0, "shards": {shard: [None] * len(weights) for shard in self.shards}}
        """State to start from: the first sequence of the next batch, of all ranks together, and that of each stream."""
        self._streams: dict[int, list[Stream]] = {}

    def __iter__(self) -> Iterator[Batch]:
        self._streams = {
            shard: [self._open_stream(source, shard, state) for source, state in enumerate(states)]
            for shard, states in self.start["shards"].items()
        }
        sequence, length = self.start["sequence"], self._batch_size * self._num_ranks
        while True:
            rows, end = self._read(sequence, sequence + length)
            if end < sequence + length:
                if rows := self._filled(rows, end - sequence):
                    yield self._batch(rows, end)
                return
            sequence = end
            yield self._batch(rows, sequence)

    def _read(self, first: int, end: int) -> tuple[list[PackedSequence], int]:
        """This rank's share of the sequences from ``first`` on, and the sequence before which the reading ended."""
        rows = []
        for sequence in range(first, end):
            if sequence % self.num_shards in self._streams:
                packed = self._streams[sequence % self.num_shards][self._draw(sequence)].next()
                if packed is None:
                    return rows, sequence
                if sequence % self._num_ranks == self._rank:
                    rows.append(packed)
        return rows, end

    def _draw(self, sequence: int) -> int:
        """Source of a sequence: a function of seed and sequence, so that it needs no state."""
        if len(self._weights) == 1:
            return 0
        return random.Random(f"{self._seed} {sequence}").choices(range(len(self._weights)), self._weights)[0]

    def _filled(self, rows: list[PackedSequence], num_sequences: int) -> list[PackedSequence]:
        """The last, shorter batch with as many rows as on all other ranks; the one too many has no label."""
        while len(rows) < math.ceil(num_sequences / self._num_ranks):
            nothing = torch.zeros(self._seq_len, dtype=torch.int64)
            rows.append(PackedSequence(nothing, torch.full_like(nothing, IGNORE_INDEX), torch.arange(self._seq_len)))
        return rows

    def _batch(self, rows: list[PackedSequence], sequence: int) -> Batch:
        tokens, labels, positions = (torch.stack(column) for column in zip(*rows))
        shards = {shard: [stream.state() for stream in streams] for shard, streams in self._streams.items()}
        return Batch({"input": tokens, "positions": positions}, labels, {"sequence": sequence, "shards": shards})

    def remainder(self) -> PackedSequence | None:
        """What finite data of one source leaves over after the last batch, see `Stream.remainder`."""
        return self._streams[0][0].remainder()
