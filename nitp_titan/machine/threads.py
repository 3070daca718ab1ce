"""How many OpenMP threads a rank on a CPU takes; ``__init__.py`` sets how they wait. Imports no torch."""

import os
from pathlib import Path

_VARIABLE = "OMP_NUM_THREADS"


def num_threads() -> int:
    """The user's OMP_NUM_THREADS, else this rank's share of the cores that the process may use."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if _VARIABLE in os.environ and not (local_ranks > 1 and _set_by_torchrun()):
        # Of nested levels ("4,2") the first.
        first = os.environ[_VARIABLE].partition(",")[0].strip()
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return max(1, len(os.sched_getaffinity(0)) // local_ranks)


def _set_by_torchrun() -> bool:
    """torchrun sets 1 for several local ranks where the variable is not set: then its own environment has none."""
    if os.environ[_VARIABLE] != "1":
        return False
    try:
        variables = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return not any(variable.startswith(f"{_VARIABLE}=".encode()) for variable in variables)
