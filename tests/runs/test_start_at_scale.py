"""Before a run is built one rank of a node looks at files for all, so that a thousand ranks ask the disks as two do."""

import json
import shutil

import pytest
from helpers import saved_run
from processes import warm_ranks


@pytest.fixture(scope="module")
def counts(assets, tmp_path_factory):
    """File accesses of each of two ranks of a node that resume a run: until they agree, and until it is loaded."""
    folder = tmp_path_factory.mktemp("counted")
    saved_run(folder / "here", generated_data=False, validator={"enable": False})
    # This process keeps its own folder for itself.
    shutil.copytree(folder / "here", folder / "run", ignore=shutil.ignore_patterns("run.lock"))
    flags = ["--recipe", "debug/nitp_debug", "--train-config", "cpu", "--dump_folder", str(folder / "run"), "--resume"]
    flags += ["--training.local_batch_size", "8", "--training.steps", "9"]
    done = warm_ranks(2, "tests/runs/counted_start.py", str(folder), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_only_the_first_rank_of_a_node_looks_at_files_before_the_ranks_agree(counts):
    (first, _), (second, _) = counts
    # Code, tokenizer and text are read and hashed, the files of the checkpoint are measured.
    assert {"tokenizer opened", "text opened", "checkpoint looked at"} <= first.keys() and first["code opened"] > 100
    # Of the code, what the decorators of torch read of a few modules.
    assert second.keys() <= {"code opened"} and second["code opened"] < 10


def test_only_one_rank_looks_for_the_files_of_a_checkpoint_and_each_reads_what_it_needs(counts):
    (_, first), (_, second) = counts
    assert first["checkpoint looked at"] > second.get("checkpoint looked at", 0)
    assert 0 < second["checkpoint opened"] == first["checkpoint opened"]
