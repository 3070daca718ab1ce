"""Processes that tests start."""

import os
import socket
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
_ONE_RANK = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# What a trainer in this process has set for itself.
_OF_A_TRAINER = ("TORCH_FR_", "TORCH_NCCL_")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def torchrun(num_ranks: int, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a module or script under torchrun, in the project; returns the finished process with its output."""
    own = [key for key in os.environ if key in _ONE_RANK or key.startswith(_OF_A_TRAINER)]
    environment = {key: value for key, value in os.environ.items() if key not in own} | variables
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)]
    command += ["--master_port", str(free_port()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=PROJECT)
