"""Files and folders that are there wholly or not at all, locked, hashed, set aside. Imports no torch."""

import fcntl
import hashlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, TextIO

from nitp_titan.errors import at, UserError

# TorchTitan's.
logger = logging.getLogger()

WHOLE_BYTES = 8 << 20
"""`fingerprint` hashes a file up to this size whole, a larger one at its two ends: data may have terabytes in all."""

_END_BYTES = 256 << 10

LOCK = "run.lock"
"""File of a folder that `hold` locks."""


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there wholly or, if the process ends meanwhile, as it was before."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with at(path):
            draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def replace_durably(draft: Path, path: Path) -> None:
    """Give a file its name once all of it is on the disk."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)
    # Not every file system flushes folders.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_durably(path: Path, text: str) -> None:
    """As `write_atomically`, and on the disk afterwards; for a file that one process writes."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    replace_durably(draft, path)


@contextmanager
def draft_of(folder: Path) -> Iterator[Path]:
    """An empty draft of a folder, beside it: to fill and to rename to it. What is left of it at the end is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        yield draft


def free_path(path: Path) -> Path:
    """The path if there is nothing yet, else ``<path>.1`` or the next number that is free."""
    names = chain([path], (path.with_name(f"{path.name}.{number}") for number in count(1)))
    return next(other for other in names if not os.path.lexists(other))


def read_own(path: Path) -> dict[str, Any] | None:
    """A JSON file that a command of ours has written and reads again; None if it is not there.

    Raises:
        UserError: if it is damaged.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is not what nitp-titan wrote. Remove it, or choose another folder.")
    return content


def sha256(path: Path) -> str:
    """Hash of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: str | Path, num_bytes: int | None = None) -> str:
    """What identifies the content of a file, wherever it lies: ``<bytes>:<sha256>``.

    The hash is of the whole file up to 8 MiB, of a larger one of its first and last 256 KiB.

    Args:
        num_bytes: look only at so many of its first bytes. A file that grew at its end since has the old fingerprint
            under its old size.

    Raises:
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        size = size if num_bytes is None else min(size, num_bytes)
        if size <= WHOLE_BYTES:
            digest = hashlib.sha256(file.read(size))
        else:
            digest = hashlib.sha256(file.read(_END_BYTES))
            file.seek(size - _END_BYTES)
            digest.update(file.read(_END_BYTES))
    return f"{size}:{digest.hexdigest()}"


def nearest_existing(path: Path) -> Path:
    """The nearest folder or file at or above a path that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def check_writable(folder: Path, setting: str, *, table: str | None = None, key: str | None = None) -> None:
    """Make sure that a folder is there or can be made, and files in it. Leaves nothing behind.

    Args:
        setting: how the message names the folder, for example ``--out x``.
        table, key: as in `UserError`, if it is a setting of a recipe or train config.

    Raises:
        UserError: with the folder that cannot be written, and the reason.
    """
    existing = nearest_existing(folder)
    try:
        for name in folder.absolute().relative_to(existing).parts:
            # A name may be too long.
            with suppress(FileNotFoundError):
                os.stat(existing / name)
        # Root may write where the permissions say no, and may not in /proc where they say yes: try.
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{setting} cannot be written: {existing}: {error.strerror}.", table=table, key=key) from None


def archive(path: Path) -> Path:
    """Rename a folder to ``<path>.1``, or the next number that is free; return the new path.

    Raises:
        UserError: with the reason, if the folder cannot be renamed.
    """
    archived = free_path(path)
    try:
        return path.rename(archived)
    except OSError as error:
        raise UserError(f"{path} cannot be renamed to {archived}: {error.strerror}.") from None


def lock(file: TextIO) -> None:
    """Lock an open file for this process, as long as it is open.

    Raises:
        BlockingIOError: if another process holds it.
        OSError: if the file system cannot lock.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:
        raise BlockingIOError(error.errno, error.strerror) from None


# POSIX locks are released when any descriptor of the file is closed, so one is kept open per folder.
_held: dict[Path, TextIO] = {}


def hold(folder: Path) -> None:
    """Keep other processes out of a run folder, if there is one, as long as this one lives.

    A torchrun that is killed leaves its ranks behind. They train on, and would write into the same checkpoints.

    Raises:
        UserError: if another process holds it.
    """
    path, held = folder / LOCK, _held.get(folder.resolve())
    if not folder.is_dir() or (held and path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat())):
        return
    file = path.open("a+")
    try:
        lock(file)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(f"{folder} is in use: {holder} trains there. End it first.") from None
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error.strerror}): start one run there at a time.")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[folder.resolve()] = file


def append_line(path: Path, text: str) -> None:
    """Append a line, on the disk afterwards."""
    with path.open("a+b") as file:
        # A line that a crash cut short ends here.
        file.seek(max(file.tell() - 1, 0))
        cut = file.read(1) not in (b"", b"\n")
        file.write((b"\n" if cut else b"") + text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
