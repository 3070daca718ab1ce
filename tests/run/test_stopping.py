"""SIGTERM saves and exits with a status of its own; torchrun's restarts go on from there."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import free_port, PROJECT

from nitp_titan.checkpoint.saved import Checkpoint
from nitp_titan.metrics_file import read_records
from nitp_titan.run.stopping import STOPPED, STOPPED_FILE, StopSignal

NUM_STEPS = 60


def test_one_rank_knows_of_its_signal_at_once_and_the_handler_is_put_back(monkeypatch, tmp_path):
    marker = tmp_path / "stopped"
    monkeypatch.setenv(STOPPED_FILE, str(marker))
    marker.touch()
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(None) as stop:
        assert not marker.exists(), "a marker of an earlier start"
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() and stop.agreed()
        stop.announce()
    assert marker.exists()
    assert signal.getsignal(signal.SIGTERM) is before


class _Run:
    """Training on two ranks, started again and again with the same command."""

    def __init__(self, folder: Path):
        self.folder, self.output = folder, folder.parent / "log.txt"
        settings = "training.steps", NUM_STEPS, "training.seq_len", 128, "training.global_batch_size", 4
        settings += "training.local_batch_size", 2, "checkpoint.interval", 20, "metrics.log_freq", 1
        flags = [f"--{part}" if index % 2 == 0 else str(part) for index, part in enumerate(settings)]
        recipe = ["--recipe", "recipes/debug/nitp_debug.toml", "--dump_folder", str(folder)]
        self.flags = ["-m", "nitp_titan.train", *recipe, *flags, "--validator.no-enable", "--geometry.no-enable"]

    def start(self, *launcher: str) -> subprocess.Popen:
        one_rank = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {key: value for key, value in os.environ.items() if key not in one_rank}
        command = [sys.executable, "-m", "nitp_titan.torchrun", "--nproc_per_node", "2"]
        command += ["--master_port", str(free_port()), *launcher, *self.flags]
        self.log = self.output.open("w")
        return subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd=PROJECT, env=environment)

    def wait_for_step(self, step: int, process: subprocess.Popen) -> None:
        while f" step {step}/{NUM_STEPS} " not in self.text():
            assert process.poll() is None, self.text()
            time.sleep(0.02)

    def text(self) -> str:
        return self.output.read_text()

    def steps(self) -> list[int]:
        return [record["step"] for record in read_records(self.folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory) -> _Run:
    return _Run(tmp_path_factory.mktemp("stopped") / "run")


def test_sigterm_saves_after_the_same_step_on_all_ranks_and_exits_with_its_status(run):
    process = run.start()
    run.wait_for_step(5, process)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == STOPPED, run.text()
    assert time.monotonic() - started < 15
    checkpoint = Checkpoint(run.folder)
    assert 5 <= checkpoint.step < 20, "no step of the interval"
    assert run.text().count(f"Stopped by SIGTERM after step {checkpoint.step};") >= 1
    assert checkpoint.has_optimizer and run.steps() == list(range(1, checkpoint.step + 1))


def test_the_same_command_goes_on_and_torchrun_restarts_it_when_a_rank_dies(run):
    stopped = Checkpoint(run.folder).step
    process = run.start("--max-restarts", "1")
    run.wait_for_step(45, process)
    assert f"Training starts at step {stopped + 1}" in run.text()
    workers = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    assert process.wait(timeout=120) == 0, run.text()[-3000:]
    assert re.findall(r"Training starts at step (\d+)", run.text())[-1] == "41"
    assert run.steps() == list(range(1, NUM_STEPS + 1))
    assert Checkpoint(run.folder).step == NUM_STEPS


def test_a_failure_is_no_stop():
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    command = [sys.executable, "-m", "nitp_titan.torchrun", "--nproc_per_node", "1", "-m", "nitp_titan.no_such_module"]
    assert subprocess.run(command, capture_output=True, cwd=PROJECT, env=environment).returncode == 1
