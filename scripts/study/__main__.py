"""Which of the paper's mechanisms show on a small model? Train recipes/study/ with several seeds and print the table.

python scripts/study                     # about an hour on 2 quiet cores; resumes where it stopped
python scripts/study --all               # with longer training and a larger vocabulary: some hours
python scripts/study --recipe ntp --recipe nitp --seed 1
python scripts/study --report            # the table of what is there already
"""

import argparse
import os
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# `python scripts/study` has the folder itself on the path, not the one it lies in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _checkout  # noqa: F401

from nitp_titan.cli.launch import stop_all, TrainingRun
from nitp_titan.config import recipe
from nitp_titan.data.assets import prepare_stdlib_assets
from nitp_titan.errors import nearest_choice, UserError
from nitp_titan.machine import exits
from nitp_titan.progress import Progress
from study.report import mechanisms_table, read_study

SEEDS = (1, 2, 3)
# Beyond the hour: does the sign of an effect change?
LONGER = {"ntp_long", "nitp_long", "ntp_vocab_16k", "nitp_vocab_16k"}
LARGE_VOCABULARY = ("assets/stdlib_16k", 16384)
# Gradient spikes show at single steps only.
FLAGS = ["--metrics.log_freq", "1", "--geometry.interval", "25", "--validator.freq", "100"]


class Log:
    """Prints every hundredth step of a run, its other messages, and the time left for all after each run."""

    def __init__(self, num_runs: int):
        self.progress, self.lock = Progress(num_runs, "runs"), threading.Lock()

    def message(self, run: TrainingRun, text: str) -> None:
        step = text.removeprefix("step ").partition("/")[0]
        if not text.startswith("step ") or (step.isdigit() and int(step) % 100 == 0):
            with self.lock:
                print(f"{run.name}: {text}", flush=True)

    def end_of_run(self, *, trained: bool) -> None:
        with self.lock:
            self.progress.add(from_before=not trained)
            if trained:
                print(self.progress, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="a recipe of recipes/study, by name; repeat (default: all)")
    parser.add_argument("--all", action="store_true", help="the recipes that take longer, too")
    parser.add_argument("--seed", action="append", type=int, help="repeat (default: 1, 2 and 3)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--parallel", type=int, default=cores, help="runs at a time (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/study"), help="folder of all runs (%(default)s)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    available = sorted(path.stem for path in (recipe.PROJECT / "recipes/study").glob("*.toml"))
    for name in arguments.recipe or []:
        if name not in available:
            raise UserError(
                f"--recipe {name}: there is no such recipe in recipes/study.{nearest_choice(name, available)}"
            )
    if not 1 <= arguments.parallel <= cores:
        raise UserError(f"--parallel {arguments.parallel}: 1 to {cores}, the number of cores.")
    names = arguments.recipe or [name for name in available if arguments.all or name not in LONGER]
    seeds = arguments.seed or SEEDS
    if not arguments.report:
        train(names, seeds, arguments.out, arguments.parallel)
    print("\n" + mechanisms_table(read_study(arguments.out)))


def train(names: list[str], seeds: list[int], out: Path, parallel: int) -> None:
    """Train every recipe with every seed, some at a time.

    Runs share no core, or their OpenMP threads would wait for each other ten times as long as they compute.
    """
    manifest = prepare_stdlib_assets(Path("assets/stdlib"))
    if any("vocab_16k" in name for name in names):
        folder, vocab_size = LARGE_VOCABULARY
        prepare_stdlib_assets(Path(folder), vocab_size)
    runs = [
        TrainingRun(
            name=f"{name} seed {seed}",
            recipe=recipe.find(f"study/{name}", "recipes"),
            train_config=recipe.find("cpu", "train_configs"),
            folder=out / name / f"seed_{seed}",
            flags=["--debug.seed", str(seed), *FLAGS],
            data=manifest["train"],
        )
        for seed in seeds
        for name in names
    ]
    log = Log(len(runs))
    cores = queue.SimpleQueue()
    for worker in range(parallel):
        cores.put(sorted(os.sched_getaffinity(0))[worker::parallel])

    def train_one(run: TrainingRun) -> None:
        was_finished = run.finished()
        run.train(lambda text: log.message(run, text))
        log.end_of_run(trained=not was_finished)

    with ThreadPoolExecutor(parallel, initializer=lambda: os.sched_setaffinity(0, cores.get())) as pool:
        try:
            for future in [pool.submit(train_one, run) for run in runs]:
                future.result()
        except BaseException:
            # Else the runs that wait would still be trained.
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise


if __name__ == "__main__":
    exits.run(main, kept="runs keep what they have saved; the same command resumes.")
