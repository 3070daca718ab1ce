"""A killed parent hides none of its processes, and no other process is touched."""

import os
import subprocess
import sys
import time

from chaos.process_tree import ProcessTree

# As torchrun does: a worker with a session of its own, which has a child itself.
_WORKER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
_LAUNCHER = f"""
import os, subprocess, sys
subprocess.Popen(
    [sys.executable, "-c", {_WORKER!r}], start_new_session=True, env=os.environ | {{"RANK": "0"}}
).wait()
"""


def _started(log) -> ProcessTree:
    tree = ProcessTree([sys.executable, "-c", _LAUNCHER], log)
    limit = time.monotonic() + 30
    while len(tree.processes()) < 3 and time.monotonic() < limit:
        time.sleep(0.02)
    return tree


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_killed_launcher_leaves_is_found_and_ended(tmp_path):
    with _started(tmp_path / "log") as tree:
        pids = set(tree.processes())
        ranks = tree.ranks()
        assert len(pids) == 3 and set(ranks) == {0} and ranks[0] in pids - {tree.root.pid}
        assert tree.kill(tree.root.pid)
        assert not tree.wait(0.3), "the worker lives on"
        assert set(tree.processes()) == pids - {tree.root.pid} and tree.exit_status == -9
    assert tree.processes() == {} and not any(map(_runs, pids))


def test_only_its_own_processes_are_killed(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with _started(tmp_path / "log") as tree:
            assert not tree.kill(other.pid) and not tree.kill(os.getpid())
        assert not tree.kill(tree.root.pid), "it is gone"
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_output_and_the_exit_status_are_those_of_the_command(tmp_path):
    command = [sys.executable, "-c", "import os, sys; print(os.environ['NAME']); sys.exit('reason')"]
    with ProcessTree(command, tmp_path / "log", NAME="value") as tree:
        assert tree.wait(30) and tree.exit_status == 1
    assert (tmp_path / "log").read_text().split() in (["value", "reason"], ["reason", "value"])
