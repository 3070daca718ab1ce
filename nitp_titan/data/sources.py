"""Text sources as a config names them: where they are, whether they can be read, and the tokens of their documents."""

import dataclasses
import glob
import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, IterableDataset, load_dataset
from torchtitan.components.tokenizer import BaseTokenizer

from nitp_titan.config import nearest, UserError
from nitp_titan.data.mixtures import MIXTURES, TextSource
from nitp_titan.data.tokenized import check_tokens, TOKENS
from nitp_titan.errors import away
from nitp_titan.hub import TOKENIZERS, without_download_counts

# Files of a folder. Plain *.json is left out: a folder of text often holds a manifest of that name.
_PATTERNS = {"json": ("*.jsonl", "*.jsonl.gz", "*.json.gz"), "parquet": ("*.parquet",)}
# Characters; a line without end must not fill the memory.
_LONGEST_LINE = 100_000_000
_SOURCE_KEYS = [field.name for field in dataclasses.fields(TextSource) if field.name != "weight"]


@dataclass(frozen=True)
class Place:
    """A source and the place in a config that names it."""

    source: TextSource
    table: str
    key: str | None = None
    prefix: str = ""

    @property
    def name(self) -> str:
        return self.source.dataset_path or self.source.dataset

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"[{self.table}] {self.prefix}{key}{message}", table=self.table, key=self.key or key)


def places_of(config, table: str) -> list[Place]:
    """Sources of a ``TextDataLoader.Config``, given in one of three ways; UserError if they are given in two."""
    _check_one_way(config, table)
    if config.mixture is not None:
        prefix = f"mixture = '{config.mixture}', source {{}}: "
        key, sources = "mixture", MIXTURES[config.mixture]
    elif config.sources:
        prefix, key, sources = "sources[{}].", "sources", config.sources
    else:
        return [Place(TextSource(**{key: getattr(config, key) for key in _SOURCE_KEYS}), table)]
    return [Place(source, table, key, prefix.format(index)) for index, source in enumerate(sources)]


def _check_one_way(config, table: str) -> None:
    default = type(config)()
    given = [key for key in (*_SOURCE_KEYS, "mixture", "sources") if getattr(config, key) != getattr(default, key)]
    if len(given) > 1 and {"mixture", "sources"} & set(given):
        raise UserError(
            f"[{table}] has {', '.join(given[:-1])} and {given[-1]}: give either one source by its own keys, "
            "or mixture, or sources.",
            table=table,
            key=given[-1],
        )
    if config.mixture is not None and config.mixture not in MIXTURES:
        raise UserError(
            f"[{table}] mixture = '{config.mixture}' is not registered.{nearest(config.mixture, [*MIXTURES])}",
            table=table,
            key="mixture",
        )


def check_source(place: Place) -> None:
    """Raise UserError unless a source is well named and its local files begin with a document; touches no network."""
    source = place.source
    if not 0 < source.weight < float("inf"):
        raise place.error("weight", f" = {source.weight!r}, but it must be a finite number above 0.")
    if not source.text_field:
        raise place.error("text_field", f" = {source.text_field!r} names no field.")
    if source.dataset in _PATTERNS:
        _check_files(place)
    elif source.dataset == TOKENS:
        check_tokens(place)
    elif "/" not in source.dataset:
        raise place.error(
            "dataset",
            f" = '{source.dataset}' is neither 'json' nor 'parquet' nor '{TOKENS}' nor a Hugging Face dataset "
            f"'owner/name'.{nearest(source.dataset, [*_PATTERNS, TOKENS])}",
        )


def _check_files(place: Place) -> None:
    source = place.source
    if not source.dataset_path:
        raise place.error("dataset_path", f" is missing: dataset = '{source.dataset}' needs a file, folder or pattern.")
    files = local_files(source.dataset_path, source.dataset)
    if not files:
        raise place.error(
            "dataset_path", f" = '{source.dataset_path}' names no file.{how_to_make(source.dataset_path)}"
        )
    first, what = {
        "json": (_first_json, "line 1 is not a JSON object"),
        "parquet": (_first_row, "there is no first row: not a parquet file, or an empty one"),
    }[source.dataset]
    for file in files:
        try:
            document = first(file)
        except (OSError, EOFError, ValueError, RecursionError, zlib.error):
            document = None
        if not isinstance(document, dict):
            raise place.error("dataset_path", f": {file}, {what}.")
        _text(document, place=place, where=f"{file}, {'line' if source.dataset == 'json' else 'row'} 1")


def local_files(path: str, kind: str = "json") -> list[str]:
    """Files that a path, a folder or a glob pattern names, sorted; of a folder those of the kind json or parquet."""
    folder = Path(path)
    patterns = [str(folder / pattern) for pattern in _PATTERNS.get(kind, ())] if folder.is_dir() else [path]
    return sorted(name for pattern in patterns for name in glob.glob(pattern) if Path(name).is_file())


def _first_json(file: str) -> Any:
    opened = gzip.open if file.endswith(".gz") else open
    with opened(file, "rt", encoding="utf-8") as stream:
        return json.loads(stream.readline(_LONGEST_LINE))


def _first_row(file: str) -> dict[str, Any] | None:
    with pyarrow.parquet.ParquetFile(file) as parquet:
        rows = (row for batch in parquet.iter_batches(batch_size=1) for row in batch.to_pylist())
        return next(rows, None)


def is_streamed(source: TextSource) -> bool:
    """Whether a source is read on the fly; else it is indexed."""
    if source.streaming is None:
        return source.dataset not in (*_PATTERNS, TOKENS)
    return source.streaming


def open_source(place: Place) -> Dataset | IterableDataset:
    """The data set of a source of text, indexed or streamed; UserError if it cannot be opened."""
    source, path = place.source, place.name
    is_local, streaming = source.dataset in _PATTERNS, is_streamed(source)
    without_download_counts()
    try:
        if is_local:
            files = local_files(path, source.dataset)
            return load_dataset(source.dataset, data_files=files, split="train", streaming=streaming)
        return load_dataset(path, name=source.subset, split=source.split, streaming=streaming)
    except Exception as error:
        if not is_local and (gone := away(error, path)):
            raise gone from error
        # `datasets` raises many types here; each of them means that what the config names is wrong.
        kinds = {"json": "line is a JSON object", "parquet": "file is a table"}
        said = (
            f" = '{path}': not every {kinds[source.dataset]} with the fields of the first"
            if is_local
            else f" = '{path}' (subset {source.subset!r}, split {source.split!r}) could not be opened"
        )
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise place.error("dataset_path" if is_local else "dataset", f"{said}: {reason}") from error


def _text(document: dict[str, Any], *, place: Place, where: str | None = None) -> str:
    source = place.source
    fields = [source.text_field] if isinstance(source.text_field, str) else source.text_field
    for name in fields:
        if not isinstance(document.get(name), str):
            where = where or f"dataset '{place.name}'"
            raise place.error(
                "text_field",
                f" = '{name}': a document of {where} has no such text.{nearest(name, list(document))}",
            )
    return "\n\n".join(document[name] for name in fields)


def tokens_of(document: dict[str, Any], *, place: Place, tokenizer: BaseTokenizer) -> list[int]:
    """Tokens of a document, with those that begin and end it."""
    return tokenizer.encode(_text(document, place=place), add_bos=True, add_eos=True)


def how_to_make(path: str) -> str:
    """What to run for a tokenizer or corpus that is missing, or nothing where that is not known."""
    name = Path(path).name
    if name in TOKENIZERS:
        return f" Run `python scripts/download_assets.py {name}` to fetch it."
    return " Run `python scripts/prepare_assets.py` to make it." if "assets/stdlib" in path else ""
