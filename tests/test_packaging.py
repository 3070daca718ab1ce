"""An installed copy: recipes and train configs inside, training from any folder, one version."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import tomli
import yaml
from processes import environment, free_port, PROJECT

import nitp_titan
from nitp_titan.config import recipe
from nitp_titan.export import card
from nitp_titan.runs import provenance
from nitp_titan.step_files import read_records

FOLDERS = ("recipes", "train_configs")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # A build leaves files beside what it builds.
    source = tmp_path_factory.mktemp("source")
    for name in ("nitp_titan", *FOLDERS):
        shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(source / "dist")]
    done = subprocess.run([*PIP, "wheel", str(source), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the package alone; the rest comes from the environment of the tests."""
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*PIP, "install", *options, str(wheel)], check=True, capture_output=True)
    return target


def _python(installed, folder, *arguments):
    variables = environment(PYTHONPATH=str(installed))
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=variables)


def test_the_wheel_has_the_package_with_recipes_and_train_configs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    found = {name for name in names if ".dist-info/" not in name}
    wanted = {str(path.relative_to(PROJECT)) for path in (PROJECT / "nitp_titan").rglob("*.py")}
    for folder in FOLDERS:
        wanted |= {f"nitp_titan/{path.relative_to(PROJECT)}" for path in (PROJECT / folder).rglob("*.toml")}
    assert found == wanted
    assert any("licenses/LICENSE" in name for name in names)


def test_an_installed_copy_finds_its_recipes_from_any_folder(installed, tmp_path):
    code = (
        "import json\nfrom nitp_titan.config import recipe\n"
        "found = [recipe.find(n, 'recipes') for n in ('debug/nitp_debug', 'recipes/debug/nitp_debug.toml')]\n"
        "weights = {n: recipe.read_recipe(recipe.find(n, 'recipes')).tables.get('nitp', {}).get('weight', 0)\n"
        "           for n in recipe.available('recipes')}\n"
        "print(json.dumps([[str(path) for path in found], recipe.available('train_configs'), weights]))\n"
    )
    done = _python(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    found, train_configs, weights = json.loads(done.stdout)
    assert found == [str(installed / "nitp_titan/recipes/debug/nitp_debug.toml")] * 2
    assert train_configs == recipe.available("train_configs") and list(weights) == recipe.available("recipes")
    assert weights["moe/nitp_9b_a1b"] == 0.8 and weights["moe/ntp_9b_a1b"] == 0


def test_an_installed_copy_trains_in_a_folder_that_has_only_text(installed, assets, tmp_path):
    shutil.copytree(assets, tmp_path / "assets/stdlib")
    # The user's own recipe extends one of the project's.
    own = f'extends = "{os.path.relpath(installed, tmp_path)}/nitp_titan/recipes/debug/ntp_debug.toml"\n'
    (tmp_path / "mine.toml").write_text(own + "nitp = {weight = 0.5, target_layer = 1}\n")
    flags = ["--train-config", "cpu", "--training.steps", "1", "--checkpoint.no-enable", "--validator.no-enable"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", str(free_port())]
    done = _python(installed, tmp_path, *torchrun, "-m", "nitp_titan.train", "--recipe", "mine.toml", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "outputs").glob("*/mine")
    assert read_records(run / "metrics.jsonl")[-1]["nitp_loss"] > 0
    start = json.loads((run / "starts.jsonl").read_text())
    assert start["git"] is None and start["versions"]["nitp-titan"] == nitp_titan.__version__


def test_there_is_one_version(wheel):
    assert wheel.name.startswith(f"nitp_titan-{nitp_titan.__version__}-")
    assert provenance.versions()["nitp-titan"] == nitp_titan.__version__
    assert yaml.safe_load((PROJECT / "CITATION.cff").read_text())["version"] == nitp_titan.__version__
    project = tomli.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and project["dynamic"] == ["version"]


def test_the_paper_is_cited_alike_in_the_project_and_in_exported_models():
    (paper,) = yaml.safe_load((PROJECT / "CITATION.cff").read_text())["references"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    title, year = paper["title"], paper["year"]
    cited = card.CITATION.replace("{{NITP}", "{NITP").replace("{LLM}", "LLM")
    for text in (authors, title, str(year), paper["collection-title"], paper["notes"]):
        assert text in cited
