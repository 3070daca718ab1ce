"""Training on a CPU beside other work: threads that wait sleep, and their number is the user's."""

import ast
import os
import re
import subprocess
import sys

import pytest
from processes import PROJECT

CORES = len(os.sched_getaffinity(0))
# As torchrun: the variable is set for several ranks where it is not set.
TORCHRUN = """
import os, subprocess, sys
if "OMP_NUM_THREADS" not in os.environ and os.environ["LOCAL_WORLD_SIZE"] != "1":
    os.environ["OMP_NUM_THREADS"] = "1"
code = "from nitp_titan.machine import threads; print(threads.num_threads())"
subprocess.run([sys.executable, "-c", code], check=True)
"""


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    return done


def spins(done: subprocess.CompletedProcess) -> int:
    """How often a thread looks before it sleeps; OpenMP prints its settings when it is loaded, with torch."""
    return int(re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr).group(1))


@pytest.mark.parametrize(
    ("ranks", "chosen", "threads"),
    [
        ("1", {}, CORES),
        ("1", {"OMP_NUM_THREADS": "1"}, 1),
        ("1", {"OMP_NUM_THREADS": "5"}, 5),
        ("2", {}, max(1, CORES // 2)),
        ("2", {"OMP_NUM_THREADS": "5"}, 5),
        (str(4 * CORES), {}, 1),
    ],
)
def test_the_number_of_threads_is_the_users_else_a_share_of_the_cores(ranks, chosen, threads):
    assert int(run(TORCHRUN, LOCAL_WORLD_SIZE=ranks, **chosen).stdout) == threads


def test_one_thread_for_several_ranks_is_the_users_only_where_torchrun_was_started_with_it():
    # With many cores a share of them is more than one thread, so that the two differ.
    many = TORCHRUN.replace("import threads", "import threads; threads.os.sched_getaffinity = lambda pid: range(64)")
    assert int(run(many, LOCAL_WORLD_SIZE="2").stdout) == 32
    assert int(run(many, LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1").stdout) == 1


@pytest.mark.parametrize("module", ["nitp_titan.train", "nitp_titan.torchrun", "nitp_titan.cli.launch"])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(module):
    load = f"import {module}, torch"
    assert spins(run(load, OMP_DISPLAY_ENV="verbose")) == 0
    assert spins(run(load, OMP_DISPLAY_ENV="verbose", OMP_WAIT_POLICY="ACTIVE")) > 0


def test_processes_that_a_script_starts_wait_asleep_too():
    code = "import nitp_titan, subprocess, sys; subprocess.run([sys.executable, '-c', 'import torch'])"
    assert spins(run(code, OMP_DISPLAY_ENV="verbose")) == 0


@pytest.mark.parametrize("script", sorted(PROJECT.glob("scripts/*.py")), ids=lambda path: path.stem)
def test_no_script_loads_torch_before_this_package(script):
    imports = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    packages = [name.partition(".")[0] for name in names]
    outside = [name for name in packages if name not in sys.stdlib_module_names]
    # Which imports this package.
    first = next(index for index, name in enumerate(outside) if name in ("_checkout", "nitp_titan"))
    assert "torch" not in outside[:first]
