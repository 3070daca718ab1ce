"""A source that is cut into shards of tokens: writing one, finding what is written, and joining them.

A shard is written under another name, flushed to the disk, renamed, and only then noted in the folder ``unfinished``.
The manifest comes last, and ``unfinished`` goes.
"""

import dataclasses
import hashlib
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torchtitan.components.tokenizer import BaseTokenizer

from nitp_titan.data import tokenizer as text_tokenizer
from nitp_titan.data.configured_source import ConfiguredSource
from nitp_titan.data.sources import tokens_of
from nitp_titan.data.text_sets import TextStream
from nitp_titan.data.tokens.folder import (
    dtype_for,
    MANIFEST,
    Manifest,
    OFFSET_BYTES,
    OFFSETS,
    Shard,
    shard_name,
    UNFINISHED,
)
from nitp_titan.errors import first_line, UserError
from nitp_titan.files import replace_durably, write_durably
from nitp_titan.machine.failures import away, surroundings

_TYPECODES = {"uint16": "H", "uint32": "I"}


class FlagSource(ConfiguredSource):
    """A source that flags name."""

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"--{key.replace('_', '-')}{message}")


def load_tokenizer(folder: str) -> BaseTokenizer:
    """A tokenizer as training reads it; UserError if there is none."""
    try:
        return text_tokenizer.load_tokenizer(folder)
    except text_tokenizer.UnfitTokenizer as error:
        raise UserError(f"--tokenizer {folder}{error}") from None


@dataclass(frozen=True)
class TokenJob:
    """A source that is cut into shards, its tokenizer and the folder of its tokens: all that a worker needs."""

    data: Dataset | IterableDataset | TextStream
    entry: ConfiguredSource
    tokenizer: str
    vocab_size: int
    folder: Path
    num_shards: int

    @property
    def num_documents(self) -> int | None:
        """Documents of the source; None for a streamed one."""
        return len(self.data) if isinstance(self.data, Dataset) else None

    def write(self, shard: int, tokenizer: BaseTokenizer) -> None:
        """Tokenize the documents of a shard. It is `done` when all of it is on the disk."""
        rows, part = self._part(shard)
        drafts = [self._draft(shard, kind) for kind in ("tokens", "offsets")]
        digest, num_tokens, num_documents = hashlib.sha256(), 0, 0
        with drafts[0].open("wb") as tokens, drafts[1].open("wb") as offsets:
            for row in self._read(rows):
                ids = self._ids(row, tokenizer)
                data = self._array(ids).tobytes()
                num_tokens, num_documents = num_tokens + len(ids), num_documents + 1
                tokens.write(data)
                offsets.write(num_tokens.to_bytes(OFFSET_BYTES, "little"))
                digest.update(data)
        replace_durably(drafts[0], self.folder / shard_name(shard))
        replace_durably(drafts[1], self._ends(shard))
        facts = dataclasses.asdict(Shard(part, num_documents, num_tokens, digest.hexdigest()))
        write_durably(self._note(shard), json.dumps(facts))

    def _part(self, shard: int) -> tuple[Dataset | IterableDataset | TextStream, str]:
        documents = self.num_documents
        unit, total = ("files", self.data.num_shards) if documents is None else ("documents", documents)
        size, longer = divmod(total, self.num_shards)
        first = shard * size + min(shard, longer)
        end = first + size + (shard < longer)
        return self.data.shard(self.num_shards, shard, contiguous=True), f"{unit} {first}:{end}"

    def _read(self, rows: Dataset | IterableDataset | TextStream) -> Iterator[dict[str, Any]]:
        documents, key = iter(rows), "dataset_path" if self.entry.source.dataset_path else "dataset"
        while True:
            try:
                row = next(documents, None)
            except UserError:
                raise
            except Exception as error:
                # `datasets` raises many types for a file that it cannot read.
                message = f" = '{self.entry.name}' cannot be read: {type(error).__name__}: {first_line(error)}"
                found = away(error, self.entry.name) or surroundings(error, self.entry.name)
                raise found or self.entry.error(key, message) from None
            if row is None:
                return
            yield row

    def _ids(self, row: dict[str, Any], tokenizer: BaseTokenizer) -> list[int]:
        ids = tokens_of(row, entry=self.entry, tokenizer=tokenizer)
        if ids and max(ids) >= self.vocab_size:
            raise UserError(f"--tokenizer {self.tokenizer} gives token {max(ids)} and says it has {self.vocab_size}.")
        return ids

    def done(self, shard: int) -> Shard | None:
        """Facts of a shard that is finished and whole, else None."""
        try:
            found = Shard(**json.loads(self._note(shard).read_text()))
            sizes = [(self.folder / shard_name(shard)).stat().st_size, self._ends(shard).stat().st_size]
        except (OSError, ValueError, TypeError):
            return None
        return found if sizes == [found.tokens * self._array().itemsize, found.documents * OFFSET_BYTES] else None

    def begun(self, shard: int) -> tuple[int, int]:
        """Documents and tokens of a shard that is being written, as far as they have reached its files."""
        sizes = [0, 0]
        for index, kind in enumerate(("offsets", "tokens")):
            with suppress(OSError):
                sizes[index] = self._draft(shard, kind).stat().st_size
        return sizes[0] // OFFSET_BYTES, sizes[1] // self._array().itemsize

    def clear(self) -> None:
        """Remove the drafts of a killed worker."""
        for draft in (self.folder / UNFINISHED).glob("*.tmp"):
            draft.unlink()

    def finish(self, settings: dict[str, Any]) -> Manifest:
        """Join the borders of the documents of all shards, which are `done`, and write the manifest.

        Raises:
            UserError: if the files of a shard are gone.
        """
        shards = [facts for shard in range(self.num_shards) if (facts := self.done(shard))]
        if len(shards) < self.num_shards:
            raise UserError(f"--out {self.folder}: a finished shard is gone; the same command writes it again.")
        draft, digest, before = self.folder / UNFINISHED / OFFSETS, hashlib.sha256(), 0
        with draft.open("wb") as file:
            for shard, facts in enumerate(shards):
                ends = array("q")
                ends.frombytes(self._ends(shard).read_bytes())
                borders = array("q", [0] if shard == 0 else [])
                borders.extend(before + end for end in ends)
                file.write(data := borders.tobytes())
                digest.update(data)
                before += facts.tokens
        replace_durably(draft, self.folder / OFFSETS)
        manifest = Manifest(
            **settings,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            dtype=dtype_for(self.vocab_size),
            documents=sum(facts.documents for facts in shards),
            tokens=before,
            offsets_sha256=digest.hexdigest(),
            shards=shards,
        )
        write_durably(self.folder / MANIFEST, manifest.text())
        shutil.rmtree(self.folder / UNFINISHED)
        return manifest

    def _array(self, ids: Iterable[int] = ()) -> array:
        return array(_TYPECODES[dtype_for(self.vocab_size)], ids)

    def _draft(self, shard: int, kind: str) -> Path:
        return self.folder / UNFINISHED / f"shard_{shard:05}.{kind}.tmp"

    def _ends(self, shard: int) -> Path:
        """File of the documents' ends within the shard's tokens."""
        return self.folder / UNFINISHED / f"shard_{shard:05}.offsets"

    def _note(self, shard: int) -> Path:
        return self.folder / UNFINISHED / f"shard_{shard:05}.json"
