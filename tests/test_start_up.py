"""What a start costs beside TorchTitan's own, counted so that no other load of the machine matters."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from helpers import saved_run
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.models.common.decoder import Decoder

from nitp_titan.runs import provenance

HEAVY = {"torch", "torchtitan", "datasets", "pyarrow", "transformers", "matplotlib", "numpy", "pandas", "tyro"}
# Light ones. Everything else that this project imports to train, TorchTitan has imported before.
OURS = {"nitp_titan", "safetensors", "tomli", "tomli_w"}

COMMAND = """
import json, runpy, sys, time
sys.path.insert(0, "scripts")
runpy.run_path("scripts/recipe.py", run_name="__main__")
packages = {name.split(".")[0] for name in sys.modules}
print(json.dumps({"seconds": time.process_time(), "packages": sorted(packages)}))
"""

IMPORTS = """
import gc, json, sys
from nitp_titan.train import import_torchtitan

def packages():
    return {name.split(".")[0] for name in sys.modules}

before, searches = packages(), []
gc.callbacks.append(lambda phase, info: searches.append(info["generation"]))
import_torchtitan()
gc.callbacks.clear()
counts = {"searches": len(searches), "enabled": gc.isenabled(), "frozen": gc.get_freeze_count()}
import torchtitan.models.llama3.config_registry
theirs = packages()
import nitp_titan.training.trainer
print(json.dumps({**counts, "before": sorted(before), "added": sorted(packages() - theirs), "all": sorted(packages())}))
"""


def _run(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["show", "moe/nitp_9b_a1b"], ["diff", "debug/ntp_debug", "debug/nitp_debug"]],
    ids=lambda arguments: arguments[0],
)
def test_looking_at_recipes_takes_less_than_a_second_and_imports_nothing_heavy(project_folder, arguments):
    done = _run(COMMAND, *arguments)
    assert not HEAVY & set(done["packages"])
    assert done["seconds"] < 1


def test_a_train_config_that_is_not_there_is_named_before_anything_heavy_is_imported(project_folder):
    code = (
        "import runpy, sys\nsys.path.insert(0, 'scripts')\n"
        "try:\n    runpy.run_path('scripts/recipe.py', run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code)\n"
        f"print({HEAVY} & {{name.split('.')[0] for name in sys.modules}})\n"
    )
    command = [sys.executable, "-c", code, "check", "debug/nitp_debug", "no_such_config"]
    done = subprocess.run(command, capture_output=True, text=True)
    end, imported = done.stdout.splitlines()
    assert "no_such_config.toml does not exist" in end and imported == "set()"


HELP = """
import json, sys, time
from nitp_titan import train
sys.argv[1:] = ["--help"]
train.main()
packages = {name.split(".")[0] for name in sys.modules}
print(json.dumps({"seconds": time.process_time(), "packages": sorted(packages)}))
"""


def test_the_help_of_training_takes_less_than_a_second_and_imports_nothing_heavy(project_folder):
    done = _run(HELP)
    assert not HEAVY & set(done["packages"])
    assert done["seconds"] < 1


@pytest.fixture(scope="module")
def imported(project_folder):
    return _run(IMPORTS)


def test_arguments_are_read_before_torch_is_imported(imported):
    assert not HEAVY & set(imported["before"])


def test_torchtitan_is_imported_without_looking_for_garbage(imported):
    assert imported["searches"] == 0
    assert imported["enabled"] and imported["frozen"] > 100_000


def test_training_imports_nothing_heavy_that_torchtitan_does_not(imported):
    added = set(imported["added"]) - sys.stdlib_module_names
    # A compiled package keeps a part of itself under a name that nobody writes.
    assert {name for name in added if not name.endswith("__mypyc")} <= OURS
    assert not {"matplotlib", "wandb", "transformers", "lm_eval"} & set(imported["all"])


def test_a_start_reads_the_tokenizer_once_and_builds_the_model_once_for_all_checks(assets, tmp_path, monkeypatch):
    counts = Counter()

    def count(owner, name, what):
        original = getattr(owner, name)

        def counting(*arguments, **options):
            counts[what(arguments)] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    count(HuggingFaceTokenizer, "__init__", lambda arguments: "tokenizers")
    count(Decoder, "__init__", lambda arguments: "models")
    count(subprocess, "run", lambda arguments: arguments[0][0])
    tokenizer = shutil.copytree(assets, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.jsonl"))
    # The second start resumes from a checkpoint of the first, so more is checked, and reads the same tokenizer.
    for steps, tokenizers in ((1, 1), (2, 0)):
        counts.clear()
        provenance.git.cache_clear()
        saved_run(tmp_path / "run", hf_assets_path=str(tokenizer), training={"steps": steps}, resume=steps > 1)
        # For the checks, and TorchTitan's.
        assert counts["models"] == 2
        assert counts["tokenizers"] == tokenizers
        assert counts["git"] <= 3
