"""scripts/multinode.slurm under a stand-in for Slurm: two nodes, played by two processes on this machine."""

import os
import socket
import subprocess
import sys

import pytest

from nitp_titan.config.recipe import PROJECT
from nitp_titan.runs.run_folder import read_starts
from nitp_titan.step_files import read_records

SCONTROL = "#!/bin/sh\nprintf 'localhost\\nelsewhere\\n'\n"
# As srun does, start the command once per node; its own options come first.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait $first; status=$?
wait $second && exit $status
"""


REQUEUE = "#!/bin/sh\n[ $1 = requeue ] && echo $2 >> $REQUEUED || echo localhost\n"


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (1, False), (0, False)])
def test_a_job_that_has_saved_and_stopped_is_requeued_and_no_other(tmp_path, status, requeued):
    for name, text in {"scontrol": REQUEUE, "srun": f"#!/bin/sh\nexit {status}\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued")}
    environment |= {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "one", "SLURM_NNODES": "1"}
    done = subprocess.run(["bash", "scripts/multinode.slurm"], env=environment, cwd=PROJECT)
    assert done.returncode == status
    assert (tmp_path / "requeued").exists() is requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "17\n"


def test_two_nodes_train_one_run_together(assets, tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    single = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in single}
    environment |= {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "two",
        "SLURM_NNODES": "2",
        "SLURM_SUBMIT_DIR": str(PROJECT),
        "RANKS_PER_NODE": "1",
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("of another run\n")
    arguments = ["--recipe", "debug/nitp_debug", "--train-config", "cpu", "--dump_folder", str(tmp_path / "run")]
    arguments += ["--training.local_batch_size", "8", "--training.steps", "2", "--metrics.log_freq", "1"]
    arguments += ["--validator.no-enable", "--overwrite"]
    done = subprocess.run(
        ["bash", "scripts/multinode.slurm", *arguments], capture_output=True, text=True, env=environment, cwd=PROJECT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_records(tmp_path / "run/metrics.jsonl")
    # Both nodes' batches of 8 sequences of 128 tokens make the recipe's 16.
    assert [record["tokens"] for record in records] == [2048, 4096]
    (start,) = read_starts(tmp_path / "run")
    assert (start["world_size"], start["hosts"], start["job"]) == (2, [socket.gethostname()], str(os.getpid()))
    assert (tmp_path / "run.1/metrics.jsonl").read_text() == "of another run\n"
    assert len(list((tmp_path / "run/structured_logs").iterdir())) == 2 and (tmp_path / "run/comm_traces").is_dir()
