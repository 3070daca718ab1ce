"""Imported first by every script: the package beside it is the one that it uses, whatever the environment has."""

import os
import sys
from pathlib import Path

_PROJECT = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, _PROJECT)
# Of the processes that it starts, too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_PROJECT, os.environ.get("PYTHONPATH")]))

from nitp_titan.machine import exits  # noqa: E402


def _end_in_one_line(kind, error, traceback) -> None:
    """As `exits.run`, while the script still imports what it needs."""
    exits.end(error, kept="nothing was begun.")
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = _end_in_one_line
