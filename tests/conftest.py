"""Shared fixtures: one process group of one rank, the generated assets, runs under torchrun."""

import gc
import logging
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import processes
from processes import PROJECT

# Scripts that tests run in this process find what is beside them.
sys.path.append(str(PROJECT / "scripts"))

# Before torch is loaded: it decides how OpenMP's threads wait.
import nitp_titan  # noqa: F401

# Files that take longest, longest first: the many short ones fill the cores beside them, to the end.
LONGEST = [
    "distributed/test_layouts",
    "training/test_preemption",
    "chaos/test_campaign",
    "test_readme",
    "test_entry_points",
    "cli/test_recipe_tool",
    "overhead/test_full_size",
    "distributed/test_elastic",
    "models/test_moe",
    "checkpoint/test_optimizer_states",
    "distributed/test_hf",
    "report/test_report",
    "bad_input/test_mistakes",
    "objectives/test_variant",
    "export/test_parity",
    "export/test_export",
    "test_safety",
    "study/test_study",
    "evaluation/test_command",
    "bad_input/test_unfit_checkpoints",
    "training/test_bad_steps",
    "test_commands",
    "evaluation/test_harness",
    "machine/test_threads",
]


def pytest_configure(config):
    # Modules of the tests import a million objects, all of which stay; not to look through them is a third less time.
    gc.disable()
    # Each process of pytest-xdist, and what it starts, has its share of the cores.
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    # No test reaches the Hugging Face hub; those that talk to one start it themselves.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if config.option.markexpr != "gpu":
        # The other tests are about the CPU, on a machine with a GPU too.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu: these tests need a GPU, and torch finds none here.")


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {f"{PROJECT}/tests/{name}.py": index for index, name in enumerate(LONGEST)}
        assert all(map(os.path.exists, place)), "LONGEST names a file that has moved"
        items.sort(key=lambda item: place.get(str(item.path), len(place)))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="not run: needs a GPU and ./scripts/test.sh -m gpu"))


def pytest_collection_finish():
    # Nor does any later look for garbage look through them.
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def project_folder():
    """Tests run in the project, as users do; as rank 0 of a world of one."""
    os.chdir(PROJECT)
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    os.environ.update(one_rank, MASTER_PORT=str(processes.free_port()))
    return PROJECT


@pytest.fixture(autouse=True)
def logging_on():
    """Logging as TorchTitan has it: commands that other tests run in this process turn it off for their own."""
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.INFO)


@pytest.fixture(scope="session")
def assets(project_folder):
    """The corpus and tokenizer that the CPU train config names."""
    from nitp_titan.data.assets import prepare_stdlib_assets

    prepare_stdlib_assets(project_folder / "assets/stdlib")
    return project_folder / "assets/stdlib"


@pytest.fixture(scope="session")
def torchrun(assets):
    """`processes.torchrun`, with the assets in place."""
    return processes.torchrun


@pytest.fixture
def files(tmp_path):
    """Write a recipe and a train config with a text replaced, and load them."""
    from recipe_files import GOOD_RECIPE, GOOD_TRAIN_CONFIG

    from nitp_titan.training.trainer import load_config

    def load(old="", new="", *, train_config=(GOOD_TRAIN_CONFIG, ""), extra=""):
        (tmp_path / "recipe.toml").write_text(GOOD_RECIPE.replace(old, new) + extra)
        (tmp_path / "machine.toml").write_text("".join(train_config))
        return load_config(tmp_path / "recipe.toml", tmp_path / "machine.toml")

    return load
