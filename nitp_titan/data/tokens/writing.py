"""Text to a folder of tokens (`folder`), in parallel and resumable.

A source is cut into shards of consecutive documents by settings alone: which process wrote a shard shows nowhere. The
folder ``unfinished`` in that of the tokens holds the settings, which must stay the same, and the drafts of `shards`.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from nitp_titan.data.mixtures import TextSource
from nitp_titan.data.sources import (
    check_source,
    ConfiguredSource,
    described,
    is_streamed,
    left_out,
    local_files,
    open_source,
)
from nitp_titan.data.text_sets import TextStream
from nitp_titan.data.tokens.folder import (
    MANIFEST,
    Manifest,
    tokenizer_hashes,
    TOKENS,
    UNFINISHED,
)
from nitp_titan.data.tokens.shards import (
    FlagSource,
    load_tokenizer,
    TokenJob,
)
from nitp_titan.data.tokens.workers import write_shards
from nitp_titan.errors import changed_values, changes_text, UserError
from nitp_titan.files import lock, sha256, write_durably

MIN_SHARDS = 64
MAX_SHARD_BYTES = 2**28
"""Of an indexed source, where the number of shards is not given: a few minutes of one process."""

_SETTINGS = "settings.json"


def settings_of(source: TextSource, tokenizer: str, num_threads: int = 1) -> dict[str, Any]:
    """Entries of the manifest that identify the text and its tokenizer, in files of any number.

    Local files are hashed whole: that takes a small part of the time of tokenizing them, and no edit goes unseen.
    """
    entries = {key: value for key, value in dataclasses.asdict(source).items() if key != "weight"}
    entries["streaming"] = is_streamed(source)
    if source.dataset_path:
        files = local_files(source.dataset_path, source.dataset)
        with ThreadPoolExecutor(num_threads) as threads:
            hashes = list(threads.map(sha256, map(Path, files)))
        entries["files"] = {
            file: {"bytes": Path(file).stat().st_size, "sha256": digest} for file, digest in zip(files, hashes)
        }
    return {"source": entries, "tokenizer_files": tokenizer_hashes(tokenizer)}


def finished(folder: Path, settings: dict[str, Any], num_shards: int | None) -> Manifest | None:
    """The manifest of a folder that is complete; UserError if it is damaged or of something else."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = Manifest.read(folder)
        manifest.check_files(folder)
    except ValueError as error:
        raise UserError(f"--out {folder}{error}") from None
    before = {"source": manifest.source, "tokenizer_files": manifest.tokenizer_files}
    _refuse_other(folder, before | {"num_shards": len(manifest.shards)}, settings, num_shards)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    return manifest


def _refuse_other(folder: Path, before: dict[str, Any], settings: dict[str, Any], num_shards: int | None) -> None:
    now = settings | {"num_shards": num_shards or before["num_shards"]}
    changed = changed_values(_named(**before), _named(**now))
    if changed:
        raise UserError(f"--out {folder} holds other tokens: {changes_text(changed)}. Choose another --out.")


def _named(source: dict[str, Any], tokenizer_files: dict[str, str], num_shards: int) -> dict[str, Any]:
    """Settings by the names that messages give them."""
    flags = {f"--{key.replace('_', '-')}": value for key, value in source.items() if key != "files"}
    hashes = {file: facts["sha256"] for file, facts in source.get("files", {}).items()} | tokenizer_files
    return {**flags, **{f"hash of {name}": digest[:12] for name, digest in hashes.items()}, "--num-shards": num_shards}


def verify(folder: Path, manifest: Manifest) -> None:
    """Raise UserError unless the files of a folder are those that its manifest was written for."""
    try:
        manifest.check_files(folder, contents=True)
    except ValueError as error:
        raise UserError(f"--out {folder}{error}") from None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder for tokens and keep other processes out of it.

    Raises:
        UserError: if one is in it, or it holds other files.
    """
    others = folder.exists() and any(path.name != UNFINISHED for path in folder.iterdir())
    if others and not (folder / UNFINISHED / _SETTINGS).exists():
        raise UserError(f"--out {folder} holds other files; choose a new folder.")
    (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
    with (folder / UNFINISHED / "lock").open("w") as file:
        try:
            lock(file)
        except BlockingIOError:
            raise UserError(f"--out {folder} is in use: another process tokenizes there.") from None
        except OSError:
            # Not every file system locks: then one command at a time is up to the user.
            pass
        yield


def open_job(
    source: TextSource, tokenizer: str, folder: Path, settings: dict[str, Any], num_shards: int | None
) -> TokenJob:
    """Open a source for a folder, which holds what the same command has done before, or nothing.

    Raises:
        UserError: if the source cannot be opened or cut into so many shards, or the folder is of other settings.
    """
    entry, noted = FlagSource(source, ""), folder / UNFINISHED / _SETTINGS
    if noted.exists():
        before = json.loads(noted.read_text(encoding="utf-8"))
        _refuse_other(folder, before, settings, num_shards)
        num_shards = before["num_shards"]
    data = open_source(entry)
    num_shards = _num_shards(data, entry, num_shards)
    write_durably(noted, json.dumps(settings | {"num_shards": num_shards}, indent=2))
    return TokenJob(data, entry, tokenizer, load_tokenizer(tokenizer).get_vocab_size(), folder, num_shards)


def _num_shards(data: Dataset | IterableDataset | TextStream, entry: ConfiguredSource, wanted: int | None) -> int:
    if isinstance(data, Dataset):
        most, unit = len(data), "documents"
        default = min(most, max(MIN_SHARDS, math.ceil(data.data.nbytes / MAX_SHARD_BYTES)))
    else:
        most, unit = data.num_shards, "files, and a stream is cut between files only"
        default = most
    if most == 0:
        raise UserError(f"'{entry.name}' holds no document.")
    if wanted is not None and not 1 <= wanted <= most:
        raise UserError(f"--num-shards {wanted}: at least 1 and at most {most}, as '{entry.name}' has {most} {unit}.")
    return wanted or default


def check(source: TextSource) -> None:
    """Raise UserError unless a source is well named and, where it is local, begins with a document."""
    entry = FlagSource(source, "")
    if source.dataset == TOKENS:
        raise entry.error("dataset", f" {TOKENS} is what is made; name the text.")
    check_source(entry)


def tokenize(
    source: TextSource,
    tokenizer: str,
    folder: Path,
    *,
    num_shards: int | None = None,
    num_workers: int,
    log: Callable[[str], None],
) -> tuple[Manifest, bool]:
    """Tokenize a source into a folder, or resume it.

    Args:
        source: of text.
        tokenizer: its folder.
        num_shards: files of tokens; by default 64, more where one would hold more than 256 MiB of text, and for a
            streamed source the number of its files.
        num_workers: processes.
        log: takes lines of the log.

    Returns:
        The manifest, and whether anything was written.

    Raises:
        UserError: if source, tokenizer or folder is not fit for it, or a worker fails.
    """
    check(source)
    load_tokenizer(tokenizer)
    settings = settings_of(source, tokenizer, num_workers)
    if manifest := finished(folder, settings, num_shards):
        return manifest, False
    try:
        with alone_in(folder):
            job = open_job(source, tokenizer, folder, settings, num_shards)
            log(described(job.entry, job.data))
            if others := left_out(job.entry):
                log(f"warning: {others}")
            write_shards(job, num_workers, log)
            return job.finish(settings), True
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}.") from None
