"""With what a run was started: code, versions, command. Nothing here fails. Imports no torch."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

from nitp_titan import __version__
from nitp_titan.config import recipe
from nitp_titan.machine.credentials import redact

_PACKAGES = ("torch", "torchtitan", "torchao", "torchdata", "datasets", "tokenizers")
_GIT_TIMEOUT = 5  # seconds


def command() -> list[str]:
    """Command line of this process, without secrets."""
    return [redact(argument) for argument in sys.orig_argv]


@cache
def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide what is computed; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "nitp-titan": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@cache
def code_hash() -> str:
    """sha256 over all Python files of this package and their names."""
    folder = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@cache
def git() -> dict[str, str | list[str]] | None:
    """``commit``, and the ``dirty`` files that are not as in it; None outside of a repository, or without git."""
    try:
        # An installed copy may lie in the repository of something else.
        if not _git("ls-files", "nitp_titan/config/recipe.py"):
            return None
        dirty = [line[3:] for line in _git("status", "--porcelain").splitlines()]
        return {"commit": _git("rev-parse", "HEAD").strip(), "dirty": dirty}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(recipe.PROJECT), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_TIMEOUT,
        # `status` would write the index.
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout
