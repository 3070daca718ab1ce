"""Text sources as a config names them: where they are, whether they can be read, and the tokens of their documents."""

import dataclasses
from pathlib import Path
from typing import Any, TYPE_CHECKING

from datasets import Dataset, IterableDataset, load_dataset

from nitp_titan.data.configured_source import ConfiguredSource
from nitp_titan.data.hub import TOKENIZERS, without_download_counts
from nitp_titan.data.mixtures import MIXTURES, TextSource
from nitp_titan.data.text_files import (
    find_files,
    how_to_name,
    joined,
    read_file,
    TextError,
)
from nitp_titan.data.text_sets import indexed, TextStream
from nitp_titan.data.tokens.folder import check_tokens, TOKENS
from nitp_titan.errors import first_line, nearest_choice, short_repr, UserError
from nitp_titan.files import fingerprint
from nitp_titan.machine.failures import away, surroundings

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import BaseTokenizer

LOCAL = ("json", "parquet")
"""What ``dataset`` calls local files."""

_SOURCE_KEYS = [field.name for field in dataclasses.fields(TextSource) if field.name != "weight"]


def configured_sources(config, table: str) -> list[ConfiguredSource]:
    """Sources of a ``TextDataLoader.Config``, given in one of three ways; UserError if they are given in two."""
    _check_one_way(config, table)
    if config.mixture is not None:
        prefix = f"mixture = '{config.mixture}', source {{}}: "
        key, sources = "mixture", MIXTURES[config.mixture]
    elif config.sources:
        prefix, key, sources = "sources[{}].", "sources", config.sources
    else:
        return [ConfiguredSource(TextSource(**{key: getattr(config, key) for key in _SOURCE_KEYS}), table)]
    return [ConfiguredSource(source, table, key, prefix.format(index)) for index, source in enumerate(sources)]


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
            f"[{table}] mixture = '{config.mixture}' is not registered.{nearest_choice(config.mixture, [*MIXTURES])}",
            table=table,
            key="mixture",
        )


def check_source(entry: ConfiguredSource) -> None:
    """Raise UserError unless a source is well named and its local files begin with a document; touches no network."""
    source = entry.source
    if not 0 < source.weight < float("inf"):
        raise entry.error("weight", f" = {source.weight!r}, but it must be a finite number above 0.")
    if not source.text_field:
        raise entry.error("text_field", f" = {source.text_field!r} names no field.")
    if source.dataset in LOCAL:
        _check_files(entry)
    elif source.dataset == TOKENS:
        check_tokens(entry)
    elif "/" not in source.dataset:
        raise entry.error(
            "dataset",
            f" = '{source.dataset}' is neither 'json' nor 'parquet' nor '{TOKENS}' nor a Hugging Face dataset "
            f"'owner/name'.{nearest_choice(source.dataset, [*LOCAL, TOKENS])}",
        )


def _check_files(entry: ConfiguredSource) -> None:
    source = entry.source
    if not source.dataset_path:
        raise entry.error("dataset_path", f" is missing: dataset = '{source.dataset}' needs a file, folder or pattern.")
    files = local_files(source.dataset_path, source.dataset)
    if not files:
        how = how_to_name(source.dataset_path, source.dataset) or how_to_make(source.dataset_path)
        raise entry.error("dataset_path", f" = '{source.dataset_path}' names no file.{how}")
    try:
        firsts = [next(read_file(file, entry.fields, kind=source.dataset), None) for file in files]
    except TextError as error:
        raise entry.text_error(error) from None
    if not any(firsts):
        raise entry.error("dataset_path", f" = '{source.dataset_path}' holds no document.")


def local_files(path: str, kind: str = "json") -> list[str]:
    """Files that a path, a folder or a pattern names, sorted; of a folder those of the kind json or parquet."""
    return find_files(path, kind).files


def is_streamed(source: TextSource) -> bool:
    """Whether a source is read on the fly; else it is indexed."""
    if source.streaming is None:
        return source.dataset not in (*LOCAL, TOKENS)
    return source.streaming


def open_source(entry: ConfiguredSource) -> Dataset | IterableDataset | TextStream:
    """The data set of a source of text, indexed or streamed; UserError if it cannot be opened.

    Local files are read whole where they are indexed, so that each of their documents is known to be a text.
    """
    source, path, streaming = entry.source, entry.name, is_streamed(entry.source)
    if source.dataset in LOCAL:
        files = local_files(path, source.dataset)
        if streaming:
            return TextStream(files, entry.fields, source.dataset, error=entry.text_error)
        try:
            return indexed(files, entry.fields, source.dataset)
        except TextError as error:
            raise entry.text_error(error) from None
    without_download_counts()
    try:
        return load_dataset(path, name=source.subset, split=source.split, streaming=streaming)
    except Exception as error:
        if gone := away(error, path):
            raise gone from error
        # `datasets` raises many types here; what is not the machine's means that what the config names is wrong.
        what = f" = '{path}' (subset {source.subset!r}, split {source.split!r}) could not be opened"
        wrong = entry.error("dataset", f"{what}: {type(error).__name__}: {first_line(error)}")
        raise surroundings(error, path, network=False) or wrong from error


def described(entry: ConfiguredSource, documents: Dataset | IterableDataset | TextStream) -> str:
    """The extent of a source in words: files, documents, or bytes where it is streamed."""
    source, counts = entry.source, []
    if source.dataset in LOCAL:
        files = local_files(entry.name, source.dataset)
        counts.append(counted(len(files), "file"))
        if is_streamed(source):
            counts.append(f"{sum(Path(file).stat().st_size for file in files):,} bytes")
    if isinstance(documents, Dataset):
        counts.append(counted(len(documents), "document"))
    streamed = ["streamed"] if is_streamed(source) else []
    return f"'{entry.name}': {', '.join(counts + streamed)}"


def left_out(entry: ConfiguredSource) -> str | None:
    """Files in a source's folder or pattern that are not read, in words; None if there are none."""
    source = entry.source
    others = find_files(entry.name, source.dataset).left_out if source.dataset in LOCAL else []
    if not others:
        return None
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"'{entry.name}': not read: {', '.join(others[:3])}{more} (of another ending, or a dead link)"


def shared_text(entries: list[ConfiguredSource], others: list[ConfiguredSource]) -> str | None:
    """Name of a text of ``others`` that is in ``entries`` too, whatever a local file is called; None without one."""
    named = {_identity(entry.source) for entry in entries}
    sizes: dict[int, list[str]] = {}
    for file in _files(entries):
        sizes.setdefault(Path(file).stat().st_size, []).append(file)
    for file in _files(others):
        alike = sizes.get(Path(file).stat().st_size, [])
        if any(fingerprint(file) == fingerprint(one) for one in alike):
            return file
    return next((entry.name for entry in others if _identity(entry.source) in named), None)


def _files(entries: list[ConfiguredSource]) -> list[str]:
    local = [entry for entry in entries if entry.source.dataset in LOCAL]
    return [file for entry in local for file in local_files(entry.name, entry.source.dataset)]


def _identity(source: TextSource) -> tuple:
    path = source.dataset_path and Path(source.dataset_path).resolve()
    return source.dataset, path, source.subset, source.split


def counted(number: int, what: str) -> str:
    """A number of things in words: ``1 file``, ``2,000 files``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def _text(document: dict[str, Any], entry: ConfiguredSource) -> str:
    if entry.source.dataset in LOCAL:
        return document["text"]

    def error(found: str, is_field: bool = False) -> UserError:
        return entry.error(
            "text_field",
            f" = {entry.source.text_field!r}: a document of '{entry.name}', {short_repr(document)}: {found}",
        )

    return joined(document, entry.fields, error)


def tokens_of(document: dict[str, Any], *, entry: ConfiguredSource, tokenizer: "BaseTokenizer") -> list[int]:
    """Tokens of a document of `open_source`, with those that begin and end it."""
    return tokenizer.encode(_text(document, entry), add_bos=True, add_eos=True)


def how_to_make(path: str) -> str:
    """The command that makes a missing tokenizer or corpus; empty where it is not known."""
    name = Path(path).name
    if name in TOKENIZERS:
        return f" Run `python scripts/download_assets.py {name}` to fetch it."
    return " Run `python scripts/prepare_assets.py` to make it." if "assets/stdlib" in path else ""
