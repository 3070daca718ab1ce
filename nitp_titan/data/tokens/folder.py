"""Folders of tokens: documents that were tokenized once, memory-mapped, in the order of their text.

    manifest.json        what was tokenized with which tokenizer, and what each file holds; written last
    shard_00000.tokens   tokens of consecutive documents: raw little-endian uint16 or uint32
    documents.offsets    where each document begins among the tokens of all shards, and where the last one ends: raw
                         little-endian int64

`writing` writes them. To the loader such a folder is an indexed `Dataset` of documents, with two numbers for the
text of each, so it is split into parts, shuffled and resumed exactly as the text is.
"""

import dataclasses
import json
import mmap
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow
import torch
from datasets import Dataset
from torch import Tensor

from nitp_titan.data.configured_source import ConfiguredSource
from nitp_titan.errors import UserError
from nitp_titan.files import sha256

TOKENS = "tokens"
"""Value of ``dataset`` for such a folder."""

MANIFEST = "manifest.json"
OFFSETS = "documents.offsets"
UNFINISHED = "unfinished"
"""Folder in it while it is written."""

FORMAT = 1
OFFSET_BYTES = 8
_DTYPES = {"uint16": torch.uint16, "uint32": torch.uint32}
_SAID_DIGITS = 8


def dtype_for(vocab_size: int) -> str:
    """Type of a token in the files."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def shard_name(index: int) -> str:
    return f"shard_{index:05}.tokens"


@dataclass(frozen=True)
class Shard:
    """Facts of one file of tokens."""

    part: str
    """Of the source: ``documents 0:10``, or ``files 0:1`` of one that was streamed."""

    documents: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Facts of a folder of tokens."""

    source: dict[str, Any]
    """Settings of the text as ``[dataloader]`` names them; of local files also their bytes and sha256."""

    tokenizer: str
    """Folder of the tokenizer, as it was named."""

    tokenizer_files: dict[str, str]
    """Their sha256."""

    vocab_size: int
    dtype: str
    documents: int
    tokens: int
    offsets_sha256: str
    shards: list[Shard]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            ValueError: with the reason, as the end of a sentence that begins with the folder, if there is none.
        """
        if not folder.is_dir():
            raise ValueError(" names no folder; `python scripts/tokenize_data.py` makes one.")
        path = folder / MANIFEST
        if not path.exists() and (folder / UNFINISHED).exists():
            raise ValueError(" is not finished: give the command that began it again.")
        if not path.exists():
            raise ValueError(f" holds no {MANIFEST}, so it is no folder of `python scripts/tokenize_data.py`.")
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            if entries.pop("format") != FORMAT:
                raise ValueError
            manifest = cls(**{**entries, "shards": [Shard(**shard) for shard in entries["shards"]]})
            manifest.check()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f": its {MANIFEST} is damaged, or of another version than format {FORMAT}.") from None
        return manifest

    def check(self) -> None:
        """Raise ValueError or TypeError unless the numbers fit each other."""
        for name in ("documents", "tokens"):
            counts = [getattr(shard, name) for shard in self.shards]
            if any(type(count) is not int or count < 0 for count in counts) or sum(counts) != getattr(self, name):
                raise ValueError
        if self.dtype != dtype_for(self.vocab_size) or type(self.tokenizer_files) is not dict:
            raise ValueError

    def text(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @property
    def token_bytes(self) -> int:
        return _DTYPES[self.dtype].itemsize

    def sizes(self) -> dict[str, int]:
        """Bytes of every file beside the manifest."""
        shards = {shard_name(index): shard.tokens * self.token_bytes for index, shard in enumerate(self.shards)}
        return {**shards, OFFSETS: (self.documents + 1) * OFFSET_BYTES}

    def hashes(self) -> dict[str, str]:
        """sha256 of every file beside the manifest."""
        return {
            **{shard_name(index): shard.sha256 for index, shard in enumerate(self.shards)},
            OFFSETS: self.offsets_sha256,
        }

    def check_files(self, folder: Path, *, contents: bool = False) -> None:
        """Raise ValueError, as `read`, unless all files are there with their sizes and, if asked, their contents."""
        for name, expected in self.sizes().items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != expected:
                found = "is missing" if size is None else f"has {size:,} bytes and not {expected:,}"
                raise ValueError(f": {name} {found}; copy the folder again, or make it anew.")
        for name, digest in self.hashes().items() if contents else ():
            if sha256(folder / name) != digest:
                raise ValueError(f": {name} is not as it was written; copy the folder again, or make it anew.")


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files that make a tokenizer, sorted."""
    return sorted(Path(folder).glob("tokenizer*.json"))


def tokenizer_hashes(folder: str | Path) -> dict[str, str]:
    """sha256 of the files that make a tokenizer, by name."""
    return {path.name: sha256(path) for path in tokenizer_files(folder)}


def check_tokens(entry: ConfiguredSource) -> None:
    """Raise UserError unless a source's folder of tokens is complete and no key of text is given with it."""
    source = entry.source
    if not source.dataset_path:
        raise entry.error("dataset_path", f" is missing: dataset = '{TOKENS}' needs a folder.")
    for key in ("text_field", "subset", "split", "streaming"):
        if getattr(source, key) != getattr(type(source)(), key):
            value = getattr(source, key)
            raise entry.error(key, f" = {value!r} is of text, and '{source.dataset_path}' holds tokens: leave it out.")
    manifest = _manifest(entry)
    try:
        manifest.check_files(Path(entry.name))
    except ValueError as error:
        raise _error(entry, error) from None


def check_tokenizer(entry: ConfiguredSource, hf_assets_path: str) -> None:
    """Raise UserError unless a source's tokens are those of a recipe's tokenizer."""
    manifest, now = _manifest(entry), tokenizer_hashes(hf_assets_path)
    if manifest.tokenizer_files == now:
        return
    names = sorted({*manifest.tokenizer_files, *now})
    name = next(name for name in names if manifest.tokenizer_files.get(name) != now.get(name))
    then, found = (_said(files.get(name)) for files in (manifest.tokenizer_files, now))
    raise entry.error(
        "dataset_path",
        f" = '{entry.name}' was made with the tokenizer '{manifest.tokenizer}' ({name}: {then}), but "
        f"hf_assets_path = '{hf_assets_path}' holds another ({name}: {found}).",
    )


def _said(digest: str | None) -> str:
    return "not there" if digest is None else f"sha256 {digest[:_SAID_DIGITS]}"


def _manifest(entry: ConfiguredSource) -> Manifest:
    try:
        return Manifest.read(Path(entry.name))
    except ValueError as error:
        raise _error(entry, error) from None


def _error(entry: ConfiguredSource, error: ValueError) -> UserError:
    return entry.error("dataset_path", f" = '{entry.name}'{error}")


class TokenFolder:
    """A source's folder of tokens, which `check_tokens` passed; nothing of it is in memory until it is read."""

    def __init__(self, entry: ConfiguredSource):
        self._entry, self._folder, self._manifest = entry, Path(entry.name), _manifest(entry)
        # Of each shard, the number of tokens before it.
        self._starts = list(accumulate((shard.tokens for shard in self._manifest.shards), initial=0))
        self._maps: dict[int, memoryview] = {}

    def documents(self) -> Dataset:
        """All documents, each as its first token and the one after its last: columns of the mapped offsets."""
        borders = pyarrow.memory_map(str(self._folder / OFFSETS)).read_buffer()
        count, kind = self._manifest.documents, pyarrow.int64()
        columns = {
            name: pyarrow.Array.from_buffers(kind, count, [None, borders], offset=offset)
            for offset, name in enumerate(("start", "end"))
        }
        # Without a fingerprint `datasets` would copy and hash the columns.
        return Dataset(pyarrow.table(columns), fingerprint=self._manifest.offsets_sha256)

    def tokens_of(self, document: dict[str, int]) -> Tensor:
        """Tokens of a document, with those that begin and end it, [length], int64."""
        start, end = document["start"], document["end"]
        if start == end:
            return torch.zeros(0, dtype=torch.int64)
        shard, size = bisect_right(self._starts, start) - 1, self._manifest.token_bytes
        first = start - self._starts[shard]
        found = bytearray(self._map(shard)[first * size : (first + end - start) * size])
        tokens = torch.frombuffer(found, dtype=_DTYPES[self._manifest.dtype]).to(torch.int64) if found else None
        if tokens is None or len(tokens) != end - start or tokens.max() >= self._manifest.vocab_size:
            raise self._entry.error(
                "dataset_path",
                f" = '{self._folder}': {shard_name(shard)} or {OFFSETS} is damaged; make the folder anew.",
            )
        return tokens

    def _map(self, shard: int) -> memoryview:
        if shard not in self._maps:
            with (self._folder / shard_name(shard)).open("rb") as file:
                self._maps[shard] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return self._maps[shard]
