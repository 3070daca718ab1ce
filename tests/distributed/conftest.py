"""Trains the layouts that the collected tests ask for, one launch for each number of ranks."""

import fcntl
import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from processes import free_port, warm_ranks

sys.path.insert(0, str(Path(__file__).resolve().parent))

from matrix import Layout, LAYOUTS

from nitp_titan.step_files import read_records

WORKER = "tests/distributed/layouts.py"


def pytest_collection_modifyitems(items):
    for item in items:
        if "results" in getattr(item, "fixturenames", ()):
            # The first test of a number of ranks waits for all of its layouts.
            item.add_marker(pytest.mark.timeout(1200))


def _requested(items) -> dict[str, Layout]:
    """Layouts of the collected tests and the ones that they are compared with, one rank first."""
    names = set()
    for item in items:
        callspec = getattr(item, "callspec", None)
        names |= {callspec.params["layout"]} if callspec and "layout" in callspec.params else set()
        for marker in item.iter_markers("layouts"):
            names |= set(marker.args)
    names |= {LAYOUTS[name].reference for name in names}
    return {name: layout for name, layout in LAYOUTS.items() if name in names}


class Results:
    """Results of the requested layouts by name; those of one world size are trained when the first is asked for."""

    def __init__(self, folder: Path, layouts: dict[str, Layout]):
        self.folder, self.layouts, self.trained = folder, layouts, set()

    def __getitem__(self, name: str) -> dict:
        self._train(1)
        self._train(LAYOUTS[name].ranks)
        errors = [path for end in ("signal", "error") for path in sorted(self.folder.glob(f"{name}.*.{end}"))]
        assert not errors, f"{name}: {errors[0].read_text()[-3000:]}"
        results = json.loads((self.folder / f"{name}.json").read_text())
        files = {
            "records": "metrics.jsonl",
            "geometry": "geometry.jsonl",
            "validation_geometry": "validation_geometry.jsonl",
        }
        paths = {key: self.folder / name / file for key, file in files.items()}
        return results | {key: read_records(path) if path.exists() else [] for key, path in paths.items()}

    def _train(self, ranks: int) -> None:
        if ranks in self.trained:
            return
        self.trained.add(ranks)
        # Files of tests may be on several processes of pytest-xdist, which share what the first one trains.
        with (self.folder / f"{ranks}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if not lock.read():
                self._train_all(ranks)
                lock.write("trained")

    def _train_all(self, ranks: int) -> None:
        names = [name for name, layout in self.layouts.items() if layout.ranks == ranks]
        if ranks == 1:
            names = [f"seeds/{model}" for model in sorted({layout.model for layout in self.layouts.values()})] + names
        log = self._launch(ranks, names)
        if ended := self._ended_by_signals(names):
            # Not a mistake that Python could report: once in thousands of layouts a process is lost to its machine.
            at = max(0, log.find("Fatal Python error"))
            where = log[max(0, at - 1000) : at + 3000]
            warnings.warn(f"trained once more, since processes were ended: {ended}\n{where}", stacklevel=2)
            for name in ended:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                for left in self.folder.glob(f"{name}.*"):
                    left.unlink()
            self._launch(ranks, list(ended))

    def _launch(self, ranks: int, names: list[str]) -> str:
        ports = self.folder / f"{ranks}.json"
        ports.write_text(json.dumps({name: free_port() for name in names}))
        done = warm_ranks(ranks, WORKER, str(self.folder), str(ports))
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    def _ended_by_signals(self, names: list[str]) -> dict[str, str]:
        """Layout -> signal, of those that lost a process."""
        found = {name: sorted(self.folder.glob(f"{name}.*.signal")) for name in names}
        return {name: files[0].read_text() for name, files in found.items() if files}


@pytest.fixture(scope="session")
def results(request, assets, tmp_path_factory) -> Results:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "layouts"
    folder.mkdir(exist_ok=True)
    return Results(folder, _requested(request.session.items))


@pytest.fixture
def differences(results):
    """Compares two steps of a layout with its reference: what differs beyond the tolerances, in words."""

    def compare(name: str) -> list[str]:
        layout = LAYOUTS[name]
        gradient, loss = layout.gradient, layout.loss
        ours, one = results[name], results[layout.reference]
        found = []

        def check(what: str, value: float, expected: float, *, rel: float = 0.0, tolerance: float = 0.0) -> None:
            # Not `<=`, which a NaN passes.
            if not math.isclose(value, expected, rel_tol=rel, abs_tol=tolerance):
                found.append(f"{what}: {value!r} instead of {expected!r}")

        assert len(ours["norms"]) == len(one["norms"]) == len(ours["records"]) == len(one["records"]) == 2
        for step, (norms, expected) in enumerate(zip(ours["norms"], one["norms"]), 1):
            for group in ("projector", "rest"):
                check(f"step {step} gradient of {group}", norms[group], expected[group], rel=gradient)
            # The guard's is float32, and summed over ranks in another way.
            whole = math.hypot(norms["projector"], norms["rest"])
            check(f"step {step} gradient in the guard", ours["guarded"][step - 1], whole, rel=1e-4)
        for step, (record, expected) in enumerate(zip(ours["records"], one["records"]), 1):
            check(f"step {step} tokens", record["tokens"], expected["tokens"])
            for key in sorted({"ntp_loss", "nitp_loss"} & {*record, *expected}):
                check(f"step {step} {key}", record[key], expected[key], tolerance=loss)
        assert len(ours["geometry"]) == len(one["geometry"]) == 2
        assert (
            len(ours["validation_geometry"]) == len(one["validation_geometry"]) == int("validator" in layout.sections)
        )
        close = {"rel": max(1e-5, 10 * gradient), "tolerance": max(1e-6, gradient)}
        for kind in ("geometry", "validation_geometry"):
            for record, expected in zip(ours[kind], one[kind]):
                assert list(record) == list(expected)
                for state in set(record) - {"step"}:
                    for figure in set(record[state]) - {"spectrum"}:
                        what = f"step {record['step']} {kind} {figure} of {state}"
                        check(what, record[state][figure], expected[state][figure], **close)
        check("weights", ours["weights"], one["weights"], rel=0.1 * gradient)
        return found

    return compare
