"""The files that a run reads, its data and tokenizer, known by content.

The ranks of a run compare these facts with each other, and a run folder keeps them for the next start.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.mixtures import TextSource
from nitp_titan.data.packing import num_file_groups
from nitp_titan.data.sources import (
    configured_sources,
    counted,
    is_streamed,
    local_files,
)
from nitp_titan.data.tokens.folder import (
    MANIFEST,
    Manifest,
    tokenizer_files,
    TOKENS,
)
from nitp_titan.errors import UserError
from nitp_titan.files import fingerprint

# Fingerprints wait for the disk, on a cluster for the network.
_NUM_THREADS = 16
_SHOWN_DIGITS = 8

DataFacts = dict[str, Any]
"""``{"tokenizer": FILES, TABLE: [{"name", "streamed", "documents", "files": FILES}, ...]}`` with FILES as ``[[path,
fingerprint], ...]`` in the order of reading, TABLE as ``dataloader`` or ``validator.dataloader``."""


def data_facts(config) -> DataFacts:
    """Facts of the local files that a ``Trainer.Config`` names; of a data set of the hub its name alone is known.

    Raises:
        UserError: naming the file, if one cannot be read.
    """
    facts: DataFacts = {"tokenizer": [str(path) for path in tokenizer_files(config.hf_assets_path)]}
    loaders = {"dataloader": config.dataloader}
    if config.validator.enable:
        loaders["validator.dataloader"] = config.validator.dataloader
    for table, loader in loaders.items():
        if isinstance(loader, TextDataLoader.Config):
            facts[table] = [
                {"name": entry.name, "streamed": is_streamed(entry.source), "files": _files(entry.source)}
                for entry in configured_sources(loader, table)
            ]
    paths = {path for files in _lists_of_files(facts) for path in files}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = dict(zip(paths, pool.map(_fingerprint, paths)))
    for files in _lists_of_files(facts):
        files[:] = [[path, found[path]] for path in files]
    return facts


def _files(source: TextSource) -> list[str]:
    if not source.dataset_path:
        return []
    if source.dataset != TOKENS:
        return [str(path) for path in local_files(source.dataset_path, source.dataset)]
    folder = Path(source.dataset_path)
    try:
        names = Manifest.read(folder).sizes()
    except ValueError as error:
        raise UserError(f"{folder}{error}") from None
    return [str(folder / name) for name in (MANIFEST, *names)]


def _lists_of_files(facts: DataFacts) -> Iterable[list]:
    yield facts["tokenizer"]
    for table in facts.keys() - {"tokenizer"}:
        yield from (source["files"] for source in facts[table])


def _fingerprint(path: str) -> str:
    try:
        return fingerprint(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def with_documents(facts: DataFacts, counts: list[int | None]) -> DataFacts:
    """Facts with the number of documents of every source of ``[dataloader]``; None for a streamed one."""
    sources = [{**source, "documents": count} for source, count in zip(facts.get("dataloader", []), counts)]
    return {**facts, "dataloader": sources} if sources else facts


def by_name(facts: DataFacts) -> dict[str, str]:
    """The fingerprint of every file by the name that messages give it."""
    return {f"content of {path}": _shown(found) for files in _lists_of_files(facts) for path, found in files}


@dataclass(frozen=True)
class DataChanges:
    """How the data of a run differ from what its folder remembers, in words."""

    other: list[str] = field(default_factory=list)
    """Changes that the state of the data does not fit."""

    allowed: list[str] = field(default_factory=list)
    """Changes that ``--resume`` allows: data that grew at their end, other validation data."""


def compare(before: DataFacts, now: DataFacts, *, shuffle: bool = False, num_streams: int = 1) -> DataChanges:
    """Compare the data of two starts. Files are known by content: a moved or renamed file has not changed.

    Args:
        shuffle: whether documents are shuffled in the first epoch too.
        num_streams: of `[dataloader]`.
    """
    changes = DataChanges()
    _compare_files("the tokenizer", before["tokenizer"], now["tokenizer"], changes.other)
    for table in ("dataloader", "validator.dataloader"):
        found = changes if table == "dataloader" else DataChanges(changes.allowed, changes.allowed)
        old, new = before.get(table, []), now.get(table, [])
        if table == "dataloader" and len(old) != len(new):
            found.other.append(f"[{table}] has {counted(len(new), 'source')} instead of {len(old)}")
            continue
        for first, second in zip(old, new):
            _compare_sources(table, first, second, found, shuffle, num_streams)
    return changes


def _compare_sources(table: str, old: dict, new: dict, found: DataChanges, shuffle: bool, num_streams: int) -> None:
    name = f"[{table}] '{new['name']}'"
    if old["streamed"] != new["streamed"] and table == "dataloader":
        kinds = ["streamed" if source["streamed"] else "indexed" for source in (old, new)]
        found.other.append(f"{name} was {kinds[0]} and is {kinds[1]} (streaming)")
    elif not _grew(old["files"], new["files"]) or (
        new["streamed"] and table == "dataloader" and _groups(old, num_streams) != _groups(new, num_streams)
    ):
        _compare_files(name, old["files"], new["files"], found.other)
    elif [content for _, content in old["files"]] != [content for _, content in new["files"]]:
        number = old.get("documents")
        end = "its former end" if number is None else f"document {number:,} (counted from 0)"
        order = "" if table != "dataloader" else f": the order of documents changes from {end} on and in later epochs"
        order = ": the order of all documents changes, as they are shuffled" if order and shuffle else order
        found.allowed.append(f"{name} grew at its end{order}")


def _groups(source: dict, num_streams: int) -> int:
    # Of a data set of the hub the files are not known here.
    return num_file_groups(len(source["files"]) or 1, num_streams)


def _grew(old: list, new: list) -> bool:
    """Whether files are what they were, but for text at the end of the last one and files after it."""
    if not old or len(new) < len(old):
        return old == new
    *same, (_, last) = old
    path, now = new[len(same)]
    if [content for _, content in same] != [content for _, content in new[: len(same)]]:
        return False
    return last == now or (_size(last) < _size(now) and fingerprint(path, _size(last)) == last)


def _compare_files(what: str, old: list, new: list, found: list[str]) -> None:
    """Add the first difference of two lists of files, if there is one."""
    contents = [[content for _, content in files] for files in (old, new)]
    if contents[0] == contents[1]:
        return
    if sorted(contents[0]) == sorted(contents[1]):
        return found.append(f"{what} has the same files in another order")
    for first, second in zip_longest(old, new):
        if first is None or second is None:
            path, more = (second or first)[0], "is new" if first is None else "is not there"
            return found.append(f"{what}: {path} {more}")
        if first[1] != second[1]:
            moved = "" if first[0] == second[0] else f" ({first[0]} before)"
            return found.append(f"{what}: {second[0]}{moved} has {_shown(second[1])} instead of {_shown(first[1])}")


def _size(content: str) -> int:
    return int(content.partition(":")[0])


def _shown(content: str) -> str:
    size, _, digest = content.partition(":")
    return f"{int(size):,} bytes, hash {digest[:_SHOWN_DIGITS]}"
