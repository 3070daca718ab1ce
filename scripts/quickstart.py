"""Train the NTP and the NITP arm of the debug recipe with the same seed, data and order, and compare them."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nitp_titan import recipe
from nitp_titan.assets import prepare_stdlib_assets
from nitp_titan.config import exit_with, UserError
from nitp_titan.report import read_run, write_report

ARMS = {"ntp": "debug/ntp_debug", "nitp": "debug/nitp_debug"}


def fingerprint(recipe_name: str, train_config: Path, flags: list[str], python_text: dict) -> str:
    """Hash of everything that decides a run's result, to recognise a finished one."""
    settings = recipe.read_settings(recipe.find(recipe_name, "recipes"), train_config)
    return hashlib.sha256(repr((settings.tables, flags, python_text)).encode()).hexdigest()


def train_arm(name: str, command: list[str], folder: Path, wanted: str) -> None:
    """Run one arm unless it is finished; its full log is ``<folder>/log.txt``."""
    stamp = folder / "quickstart.json"
    found = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if found == {"fingerprint": wanted, "finished": True}:
        print(f"{name}: already trained ({folder})", flush=True)
        return
    if folder.exists() and not found:
        raise UserError(f"{folder} was not made by the quickstart; choose another folder with --out.")
    if folder.exists() and found["fingerprint"] != wanted:
        print(f"{name}: {folder} was trained with other settings; it is trained again", flush=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps({"fingerprint": wanted, "finished": False}))
    print(f"{name}: {' '.join(command)}", flush=True)
    started = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            log.write(line)
            _, found_step, rest = line.partition(" - step ")
            if found_step:
                print(f"{name}: step {rest}", end="", flush=True)
    if process.wait() != 0:
        tail = (folder / "log.txt").read_text().splitlines()
        reasons = [line for line in tail if line.startswith("error: ")] or tail[-15:]
        sys.exit("\n".join(reasons) + f"\nerror: training the {name} arm failed; the whole log is {folder}/log.txt")
    stamp.write_text(json.dumps({"fingerprint": wanted, "finished": True}))
    print(f"{name}: trained in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="optimizer steps per arm (default: the recipe's)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/quickstart"), help="folder of both runs and the report"
    )
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1")

    manifest = prepare_stdlib_assets(Path("assets/stdlib"))
    print(
        f"corpus: {manifest['train']['documents']} documents of Python's standard library, "
        f"{manifest['train']['bytes'] / 1e6:.1f} MB (assets/stdlib)",
        flush=True,
    )
    train_config = recipe.default_train_config()
    flags = [] if arguments.steps is None else ["--training.steps", str(arguments.steps)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    for name, recipe_name in ARMS.items():
        folder = arguments.out / name
        recipe_path, train_path = (
            os.path.relpath(path) for path in (recipe.find(recipe_name, "recipes"), train_config)
        )
        command = [*launcher, "-m", "nitp_titan.train", "--recipe", recipe_path, "--train-config", train_path]
        command += ["--dump_folder", str(folder), *flags]
        train_arm(name, command, folder, fingerprint(recipe_name, train_config, flags, manifest["train"]))

    report = arguments.out / "report"
    print("\n" + write_report([read_run(name, arguments.out / name) for name in ARMS], report))
    print(f"\nruns    {arguments.out}/ntp  {arguments.out}/nitp\nreport  {report}/report.md  {report}/losses.png")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with(error)
