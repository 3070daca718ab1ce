"""The folder that a script writes its page into."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from nitp_titan.config import UserError


def check_writable(out: Path) -> None:
    """Raise UserError unless files can be written into a folder, which need not exist yet. Nothing is made."""
    existing = next(path for path in (out, *out.absolute().parents) if os.path.exists(path))
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        reason = "may not be written to" if existing.is_dir() else "is no folder"
        raise UserError(f"--out {out} cannot be written: {existing} {reason}.")


def write_folder(out: Path, fill: Callable[[Path], None]) -> list[Path]:
    """Let ``fill`` write files into a folder, in which they appear once all of them are complete.

    Returns:
        The files.

    Raises:
        UserError: if they cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            draft = Path(scratch)
            fill(draft)
            names = sorted(path.name for path in draft.iterdir())
            for name in names:
                os.replace(draft / name, out / name)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from None
    return [out / name for name in names]
