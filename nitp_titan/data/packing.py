"""Documents of text sources, packed into one order of sequences that does not depend on the number of ranks.

The order is that of one endless row of sequences 0, 1, 2, ...: sequence ``j`` comes from stream ``j % num_streams`` of
a source that a seeded draw chooses for it, and is trained by data-parallel rank ``j % num_ranks``. The number of
streams is the recipe's. Document ``n`` of a source goes to stream ``n % num_streams``; a streamed source deals its
files first, where their number allows it (`num_file_groups`), so that a rank reads its own files only. What is added at
the end of a source changes nothing before it in the first epoch.

A rank reads the streams that hold its sequences and passes over the sequences of the others, so ranks share no work
where ``num_streams`` is a multiple of their number. How far every stream is read after a number of sequences follows
from that number alone: a state taken on some ranks continues on any other number of them, with no sequence lost and
none repeated.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools.logging import logger

from nitp_titan.data.text_sets import TextStream
from nitp_titan.errors import UserError
from nitp_titan.machine.failures import away, explained

# Of the shuffle of every epoch, plus its number; TorchTitan's text datasets have the same.
_SHUFFLE_SEED = 42
# Documents that are taken from an indexed source at once: one at a time costs several times as much.
_BLOCK = 16


class PackedSequence(NamedTuple):
    """Tokens, their successors within their documents and positions that restart with each; all [length], int64."""

    tokens_L: Tensor
    labels_L: Tensor
    positions_L: Tensor


class Batch(NamedTuple):
    """One batch of a rank and the state of the data after it.

    ``inputs`` holds ``input`` and ``positions``, [batch, length]; ``labels`` is [batch, length]. Finite data that has
    ended is not ``found`` any more: its rows have no label.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    state: dict[str, Any]
    found: bool


def open_documents(
    source: Dataset | IterableDataset | TextStream,
    states: Mapping[int, dict[str, Any] | None],
    num_streams: int,
    *,
    shuffle: bool = False,
) -> "dict[int, IndexedDocuments | StreamedDocuments]":
    """Documents of some streams of a source.

    Args:
        source: an indexed or a streamed data set.
        states: of each stream, from its documents' `state` to resume from, or None for the beginning.
        shuffle: whether an indexed source is shuffled in the first epoch too.
    """
    if isinstance(source, Dataset):
        return {
            stream: IndexedDocuments(source, stream, num_streams, state, shuffle=shuffle)
            for stream, state in states.items()
        }
    groups = num_file_groups(source.num_shards, num_streams)
    documents: dict[int, IndexedDocuments | StreamedDocuments] = {}
    for group in {stream % groups for stream in states}:
        own = {stream: state for stream, state in states.items() if stream % groups == group}
        # A data set of its own, that knows of no state loaded before.
        files = source.shard(groups, group, contiguous=False)
        reading = Reading(files, num_streams // groups, {stream // groups: state for stream, state in own.items()})
        documents |= {stream: StreamedDocuments(reading, stream // groups, state) for stream, state in own.items()}
    return documents


def num_file_groups(num_files: int, num_streams: int) -> int:
    """Parts that the files of a streamed source are dealt to, file ``n`` to part ``n`` modulo their number.

    Stream ``s`` reads part ``s`` modulo their number, and shares its documents with the other streams of that part. Few
    files whose number does not divide the streams are one part.
    """
    if num_files >= num_streams:
        return num_streams
    return num_files if num_streams % num_files == 0 else 1


class IndexedDocuments:
    """Documents of one stream of an indexed source, epoch after epoch; shuffled, by default from the second epoch on.

    Args:
        state: from `state`, to resume from; None for the beginning.
        shuffle: whether the first epoch is shuffled too.
    """

    def __init__(
        self, source: Dataset, stream: int, num_streams: int, state: dict[str, Any] | None, *, shuffle: bool = False
    ):
        self._source, self._shuffle = source, shuffle
        self._numbers = range(stream, len(source), num_streams)
        self.epoch = state["epoch"] if state else 0
        # Documents read in this epoch.
        self._read = state["read"] if state else 0
        self._rows = self._from(self._read)

    def _from(self, first: int) -> Iterator[dict[str, Any]]:
        numbers: Sequence[int] | np.ndarray = self._numbers
        if self._shuffle or self.epoch > 0:
            order = np.random.default_rng(_SHUFFLE_SEED + self.epoch).permutation(len(numbers))
            numbers = order * self._numbers.step + self._numbers.start
        for start in range(first, len(numbers), _BLOCK):
            columns = self._source[numbers[start : start + _BLOCK]]
            yield from (dict(zip(columns, row)) for row in zip(*columns.values()))

    def next(self) -> dict[str, Any] | None:
        """The next document; None at the end of an epoch."""
        document = next(self._rows, None)
        self._read += document is not None
        return document

    def start_epoch(self) -> None:
        """Begin again with the first document."""
        self.epoch += 1
        self._read = 0
        self._rows = self._from(0)

    def state(self) -> dict[str, Any]:
        """Where the next document is: plain numbers."""
        return {"epoch": self.epoch, "read": self._read}


class Reading:
    """Reads files of a streamed source once for some of their streams: document ``n`` goes to ``n % num_streams``.

    Documents wait in memory until their stream asks for them: as many as the streams drift apart.

    Args:
        source: a data set that nobody else reads.
        states: of each stream, from `StreamedDocuments.state` to resume from, or None for the beginning.
    """

    def __init__(
        self, source: IterableDataset | TextStream, num_streams: int, states: Mapping[int, dict[str, Any] | None]
    ):
        self._source, self._num_streams = source, num_streams
        # Of each stream, documents with the state after them; None is the end of an epoch.
        self._waiting: dict[int, deque[tuple[dict[str, Any], dict[str, Any]] | None]] = {s: deque() for s in states}
        # Epoch and number of the document from which on each stream reads.
        self._from: dict[int, tuple[int, int]] = {
            stream: (state["epoch"], state["read"]["number"] if state["read"] else 0) if state else (0, 0)
            for stream, state in states.items()
        }
        last = min(states, key=self._from.__getitem__)
        self._epoch, self._number = self._from[last]
        state = states[last]
        self._rows: Iterator[dict[str, Any]] | None = self._pass(state["read"] if state else None)

    def _pass(self, read: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        # A state that was loaded counts for its own epoch only.
        self._source.set_epoch(self._epoch)
        if read is not None:
            self._source.load_state_dict(read["source"])
        return iter(self._source)

    def next(self, stream: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The next document of a stream and the state after it; None at the end of an epoch."""
        waiting = self._waiting[stream]
        while not waiting:
            self._read()
        return waiting.popleft()

    def _read(self) -> None:
        if self._rows is None:
            self._epoch, self._number = self._epoch + 1, 0
            self._rows = self._pass(None)
        document, place = next(self._rows, None), (self._epoch, self._number)
        if document is None:
            self._rows = None
            for stream, waiting in self._waiting.items():
                if place >= self._from[stream]:
                    waiting.append(None)
            return
        stream = self._number % self._num_streams
        self._number += 1
        if stream in self._waiting and place >= self._from[stream]:
            self._waiting[stream].append((document, {"number": self._number, "source": self._source.state_dict()}))


class StreamedDocuments:
    """Documents of one stream of a streamed source, epoch after epoch.

    Args:
        state: from `state`, to resume from; None for the beginning.
    """

    def __init__(self, reading: Reading, stream: int, state: dict[str, Any] | None):
        self._reading, self._stream = reading, stream
        self.epoch = state["epoch"] if state else 0
        self._read = state["read"] if state else None

    def next(self) -> dict[str, Any] | None:
        """The next document; None at the end of an epoch."""
        found = self._reading.next(self._stream)
        if found is None:
            return None
        document, self._read = found
        return document

    def start_epoch(self) -> None:
        """Begin again with the first document."""
        self.epoch += 1
        self._read = None

    def state(self) -> dict[str, Any]:
        """Where the next document is: plain numbers, strings, lists and tables."""
        return {"epoch": self.epoch, "read": self._read}


class _Pending(NamedTuple):
    """A tokenized document that is only partly packed, with the reader state before it."""

    state: dict[str, Any]
    tokens: Tensor


class Stream:
    """Packed sequences of one stream of one source.

    The state is a document and an offset into it, not tokens: what is in between is read again.

    Args:
        documents: of this stream, from where ``state`` has them.
        tokens_of: tokens of a document, with those that begin and end it.
        seq_len: tokens per sequence.
        infinite: whether to begin again at the end.
        name: what the log calls it.
        empty: raised where endless data has no token.
        state: from `state`, to resume from; None for the beginning.
    """

    def __init__(
        self,
        documents: IndexedDocuments | StreamedDocuments,
        tokens_of: Callable[[dict[str, Any]], list[int] | Tensor],
        *,
        seq_len: int,
        infinite: bool,
        name: str,
        empty: Exception,
        state: dict[str, Any] | None,
    ):
        self._documents = documents
        self._tokens_of = tokens_of
        self._seq_len, self._infinite, self._name, self._empty = seq_len, infinite, name, empty
        self._pending: deque[_Pending] = deque()
        # Of the first pending document, the predicted tokens that are packed already.
        self._offset = state["offset"] if state else 0
        self._num_tokens = -self._offset
        # True once this epoch yielded a token; assumed True after a resume.
        self._found_any = state is not None
        self._ended = False

    def next(self) -> PackedSequence | None:
        """The next sequence; None at the end of finite data, whose last sequence is padded with ignored labels.

        Raises:
            Exception: ``empty``, if a whole epoch of endless data has no token.
        """
        while self._num_tokens < self._seq_len:
            if not self._read_document():
                return self._last()
        return self._pack(self._seq_len)

    def _last(self) -> PackedSequence | None:
        length = self._num_tokens
        if length <= 0:
            return None
        return PackedSequence(*map(torch.cat, zip(self._pack(length), _nothing(self._seq_len - length))))

    def _read_document(self) -> bool:
        if self._ended:
            return False
        state = self._documents.state()
        try:
            document = self._documents.next()
        except UserError:
            raise
        except Exception as error:
            # `datasets` raises many types for a document that it cannot read.
            found = away(error, self._name) or explained(error, self._name, f"'{self._name}' cannot be read")
            raise found from error
        if document is None:
            if not self._infinite:
                self._ended = True
                return False
            if not self._found_any:
                raise self._empty
            self._found_any = False
            self._documents.start_epoch()
            logger.info(f"{self._name} is read again from its beginning (epoch {self._documents.epoch})")
            return True
        tokens = torch.as_tensor(self._tokens_of(document), dtype=torch.int64)
        if not self._pending and self._offset >= max(len(tokens) - 1, 1):
            # The data grew since the state was taken, and a later epoch has another document here.
            self._offset = self._num_tokens = 0
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


def _nothing(length: int) -> PackedSequence:
    """Padding: tokens whose labels are ignored."""
    nothing = torch.zeros(length, dtype=torch.int64)
    return PackedSequence(nothing, torch.full_like(nothing, IGNORE_INDEX), torch.arange(length))


class PackedText(torch.utils.data.IterableDataset):
    """Batches of one data-parallel rank, each with the state after it; without an end.

    A stream of finite data ends with the first of its sources that does; rows of what has ended have no label.

    Args:
        open_streams: makes streams of a source by their numbers, each from a state, or from the beginning.
        weights: share of each source in the sequences.
        seed: of the draw of sources.
        num_streams: parts that each source is read in.
        seq_len: tokens per sequence.
        batch_size: sequences per batch of this rank.
        rank, num_ranks: which of all batches.
    """

    def __init__(
        self,
        open_streams: Callable[[int, dict[int, dict[str, Any] | None]], dict[int, Stream]],
        *,
        weights: Sequence[float],
        seed: int,
        num_streams: int,
        seq_len: int,
        batch_size: int,
        rank: int,
        num_ranks: int,
    ):
        self._open_streams = open_streams
        self._weights, self._seed, self._seq_len = list(weights), seed, seq_len
        self._batch_size, self._rank, self._num_ranks = batch_size, rank, num_ranks
        self.num_streams = num_streams
        step = math.gcd(num_ranks, num_streams)
        self.streams = range(rank % step, num_streams, step)
        """Streams that hold sequences of this rank."""
        self.start = self.beginning
        """State to start from: the first sequence of the next batch, of all ranks together, and that of each stream by
        source; None of a stream that has ended."""

    @property
    def beginning(self) -> dict[str, Any]:
        """State before the first batch."""
        return {"sequence": 0, "streams": {stream: [None] * len(self._weights) for stream in self.streams}}

    def __iter__(self) -> Iterator[Batch]:
        streams = self._opened(self.start["streams"])
        sequence, length = self.start["sequence"], self._batch_size * self._num_ranks
        while True:
            rows, found = self._read(streams, sequence, sequence + length)
            sequence += length
            yield self._batch(streams, rows, sequence, found)

    def _opened(self, states: dict[int, list[dict[str, Any] | None] | None]) -> dict[int, list[Stream] | None]:
        going = {stream: by_source for stream, by_source in states.items() if by_source is not None}
        opened = [
            self._open_streams(source, {stream: by_source[source] for stream, by_source in going.items()})
            for source in range(len(self._weights) if going else 0)
        ]
        return {stream: [streams[stream] for streams in opened] if stream in going else None for stream in states}

    def _read(self, streams: dict[int, list[Stream] | None], first: int, end: int) -> tuple[list[PackedSequence], bool]:
        """This rank's share of the sequences from ``first`` on, and whether there was any that it read."""
        rows, found = [], False
        for sequence in range(first, end):
            stream = sequence % self.num_streams
            if stream not in streams:
                continue
            by_source = streams[stream]
            packed = by_source[self._draw(sequence)].next() if by_source is not None else None
            if packed is None:
                streams[stream] = None
            found |= packed is not None
            if sequence % self._num_ranks == self._rank:
                rows.append(_nothing(self._seq_len) if packed is None else packed)
        return rows, found

    def _draw(self, sequence: int) -> int:
        """Source of a sequence: a function of seed and sequence, so that it needs no state."""
        if len(self._weights) == 1:
            return 0
        return random.Random(f"{self._seed} {sequence}").choices(range(len(self._weights)), self._weights)[0]

    def _batch(
        self, streams: dict[int, list[Stream] | None], rows: list[PackedSequence], sequence: int, found: bool
    ) -> Batch:
        tokens, labels, positions = (torch.stack(column) for column in zip(*rows))
        states = {
            stream: None if by_source is None else [one.state() for one in by_source]
            for stream, by_source in streams.items()
        }
        state = {"sequence": sequence, "streams": states}
        return Batch({"input": tokens, "positions": positions}, labels, state, found)
