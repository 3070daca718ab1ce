"""Next Implicit Token Prediction (NITP, arXiv 2605.24956) on TorchTitan.

The package imports nothing by itself, so that reading recipes stays fast.
"""

import os
import sys
from importlib.util import find_spec

# Read by pyproject.toml, as text.
__version__ = "0.1.0"

# Otherwise both would be tracebacks of a missing module.
if sys.platform != "linux":
    raise SystemExit(f"error: nitp-titan runs on Linux only (fcntl, sched_getaffinity, /proc); this is {sys.platform}.")
if find_spec("torchtitan") is None:
    raise SystemExit(
        f"error: {sys.executable} has no TorchTitan. Activate the environment: `source .venv/bin/activate` in the "
        "project's folder; ./scripts/quickstart.sh makes it."
    )

# Threads that wait for each other sleep. OpenMP's spin by default, and beside other work they spin on the core that
# their partner waits for: training on a CPU is then six times slower. OpenMP reads this when torch is loaded; every
# entry point of ours imports this package first, and the processes that it starts inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
