"""What a refused start may leave: one line, and every file as it was."""

import os
from pathlib import Path


def tree(folder: Path) -> dict[str, tuple]:
    """What is in a folder; of folders only that they are there."""
    found = {}
    for place, folders, files in os.walk(folder):
        found |= {f"{place}/{name}": () for name in folders}
        for name in files:
            status = os.lstat(f"{place}/{name}")
            found[f"{place}/{name}"] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def is_one_line(end: str) -> bool:
    return isinstance(end, str) and end.startswith("error: ") and len(end.splitlines()) == 1
