"""Local text as a data set of documents ``{"text": ...}``: streamed, or indexed in a cache that goes by content.

The index is an Arrow file of the texts alone, memory-mapped, in the cache folder of `datasets`. It is made once, by the
first process that needs it; on a machine the others wait.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset
from datasets.table import MemoryMappedTable

from nitp_titan.data.text_files import is_plain, read_file, TextError
from nitp_titan.errors import UserError
from nitp_titan.files import fingerprint, replace_durably, WHOLE_BYTES, write_atomically
from nitp_titan.machine.failures import surroundings

# Raised when the same files would give other texts or another verdict.
_FORMAT = 1
_SCHEMA = pyarrow.schema([("text", pyarrow.string())])
_BATCH_ROWS, _BATCH_CHARS = 1000, 1 << 24


class TextStream:
    """Documents of text files, read on the fly, with as much of the interface of `datasets` as is needed here.

    Args:
        files, fields, kind: as in `read_file`.
        error: makes what is raised from a `TextError`.
    """

    def __init__(
        self, files: Sequence[str], fields: Sequence[str], kind: str, *, error: Callable[[TextError], Exception]
    ):
        self._files, self._fields, self._kind, self._error = list(files), list(fields), kind, error
        self.set_epoch(0)

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return len(self._files)

    def shard(self, num_shards: int, index: int, contiguous: bool = True) -> "TextStream":
        """The files of one of ``num_shards`` parts: neighbours, or every ``num_shards``-th one."""
        if contiguous:
            size, longer = divmod(len(self._files), num_shards)
            first = index * size + min(index, longer)
            files = self._files[first : first + size + (index < longer)]
        else:
            files = self._files[index::num_shards]
        return TextStream(files, self._fields, self._kind, error=self._error)

    def set_epoch(self, epoch: int) -> None:
        """Begin again, in the same order."""
        self._state: dict[str, Any] = {"file": 0, "place": [0, 0]}

    def state_dict(self) -> dict[str, Any]:
        """Where the next document is."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state

    def __iter__(self) -> Iterator[dict[str, str]]:
        """The documents from the state on.

        Raises:
            Exception: from ``error``, in place of a `TextError`.
        """
        try:
            yield from self._read()
        except TextError as error:
            raise self._error(error) from None

    def _read(self) -> Iterator[dict[str, str]]:
        first, place = self._state["file"], self._state["place"]
        for index in range(first, len(self._files)):
            for document in read_file(self._files[index], self._fields, kind=self._kind, start=place):
                self._state = {"file": index, "place": [*document.place]}
                yield {"text": document.text}
            place = [0, 0]


def indexed(files: Sequence[str], fields: Sequence[str], kind: str) -> Dataset:
    """All documents of text files, in order; made by reading everything once, unless files of this content were before.

    Args:
        files, fields, kind: as in `read_file`.

    Raises:
        TextError: as `read_file`, in whichever document.
        UserError: if the cache cannot be written.
    """
    key = _key(files, fields, kind)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "nitp_titan" / key
    index, verdict = folder / "text.arrow", folder / "bad.json"
    try:
        if not index.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / "lock"):
                if verdict.exists():
                    file, *found = json.loads(verdict.read_text())
                    raise TextError(files[file], *found)
                if not index.exists():
                    _write(index, verdict, files, fields, kind)
                    if _key(files, fields, kind) != key:
                        index.unlink()
                        raise UserError(f"{files[0]} or another file of this text changed while it was read.")
        table = MemoryMappedTable.from_file(str(index))
    except OSError as error:
        raise surroundings(error, str(folder)) or error from None
    # Without a fingerprint `datasets` would make one from the time of the file.
    return Dataset(table, fingerprint=key)


def _key(files: Sequence[str], fields: Sequence[str], kind: str) -> str:
    """Identity of the texts, wherever the files lie."""
    contents = [_content(file) for file in files]
    plain = [is_plain(file) for file in files]
    return hashlib.sha256(json.dumps([_FORMAT, kind, [*fields], contents, plain]).encode()).hexdigest()[:32]


def _content(file: str) -> list:
    try:
        found, stat = fingerprint(file), os.stat(file)
    except OSError as error:
        raise TextError(file, None, f"cannot be read: {error.strerror}") from None
    # A large file is hashed at its ends only. Whatever changes its middle moves this time, which no tool sets back.
    return [found, stat.st_ctime_ns if stat.st_size > WHOLE_BYTES else None]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time in; others wait."""
    with path.open("w") as file:
        # Where a file system cannot lock, several make the same index, and the last one stays.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(index: Path, verdict: Path, files: Sequence[str], fields: Sequence[str], kind: str) -> None:
    draft = index.with_name(f"{index.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file, pyarrow.ipc.new_stream(file, _SCHEMA) as writer:
            for texts in _batches(files, fields, kind):
                writer.write_batch(pyarrow.record_batch([pyarrow.array(texts, pyarrow.string())], _SCHEMA))
        replace_durably(draft, index)
    except TextError as error:
        bad_file, where, *found = error.parts
        if where is not None:
            # The same content is as bad for the next process, which need not read as far to see it.
            write_atomically(verdict, json.dumps([files.index(bad_file), where, *found]))
        raise
    finally:
        draft.unlink(missing_ok=True)


def _batches(files: Sequence[str], fields: Sequence[str], kind: str) -> Iterator[list[str]]:
    texts, size = [], 0
    for file in files:
        for document in read_file(file, fields, kind=kind):
            texts.append(document.text)
            size += len(document.text)
            if len(texts) == _BATCH_ROWS or size > _BATCH_CHARS:
                yield texts
                texts, size = [], 0
    if texts:
        yield texts
