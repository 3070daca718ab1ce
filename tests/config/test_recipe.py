"""Reading recipes and train configs: inheritance, what is shipped, and the way back."""

import dataclasses
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_files import GOOD_RECIPE, GOOD_TRAIN_CONFIG

from nitp_titan import config_registry
from nitp_titan.cli import catalog
from nitp_titan.config import build, recipe
from nitp_titan.errors import UserError
from nitp_titan.runs.run_folder import write_resolved
from nitp_titan.training.trainer import load_config

PROJECT = Path(__file__).resolve().parents[2]
RECIPES = recipe.available("recipes")
TRAIN_CONFIGS = recipe.available("train_configs")


def test_the_files_that_mistakes_are_put_into_are_right(files):
    config = files()
    assert (config.nitp.weight, config.nitp.target_layer, config.training.steps) == (1.0, 2, 10)
    assert config.activation_checkpoint is None
    assert config.optimizer.param_groups[0].optimizer_kwargs["lr"] == 1e-3


def test_extends_is_one_level_deep_and_stays_among_recipes(tmp_path):
    (tmp_path / "base.toml").write_text(GOOD_RECIPE)
    (tmp_path / "child.toml").write_text('extends = "base.toml"\n[nitp]\nweight = 0.5\n')
    (tmp_path / "grandchild.toml").write_text('extends = "child.toml"\n')
    (tmp_path / "lost.toml").write_text('extends = "bse.toml"\n')
    (tmp_path / "odd.toml").write_text("extends = 3\n")
    (tmp_path / "machine.toml").write_text(GOOD_TRAIN_CONFIG)
    config = load_config(tmp_path / "child.toml", tmp_path / "machine.toml")
    assert (config.nitp.weight, config.nitp.target_layer) == (0.5, 2)
    for name, message in {
        "grandchild": "one level only",
        "lost": r"lost.toml: extends = 'bse.toml': .*bse.toml does not exist. Did you mean '.*base.toml'",
        "odd": "extends = 3, but it must be the path",
    }.items():
        with pytest.raises(UserError, match=message):
            load_config(tmp_path / f"{name}.toml", tmp_path / "machine.toml")


def test_a_mistake_in_a_base_recipe_names_the_base(tmp_path):
    (tmp_path / "base.toml").write_text(GOOD_RECIPE.replace("steps = 10", "steps = 0"))
    (tmp_path / "child.toml").write_text('extends = "base.toml"\n')
    (tmp_path / "machine.toml").write_text(GOOD_TRAIN_CONFIG)
    with pytest.raises(UserError, match=r"base.toml: \[training\] steps = 0"):
        load_config(tmp_path / "child.toml", tmp_path / "machine.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"\xff\xfe", "is not UTF-8 text"), ("folder", "is a folder")],
)
def test_an_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "recipe.toml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"recipe.toml {message}"):
        recipe.read_settings(path, tmp_path / "machine.toml")


def test_a_recipe_without_train_config_says_so(tmp_path):
    (tmp_path / "recipe.toml").write_text(GOOD_RECIPE)
    with pytest.raises(UserError, match="recipe.toml needs a train config"):
        recipe.read_settings(tmp_path / "recipe.toml", None)


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_loads_on_every_train_config_meant_for_it(name):
    machines = catalog.machines_for(name)
    assert machines
    for train_config in machines:
        config = config_registry.load(f"{name}@{train_config}")
        assert config.nitp.enabled == (not name.rpartition("/")[2].startswith("ntp"))


def test_every_train_config_names_recipes_that_exist():
    for train_config in TRAIN_CONFIGS:
        machine = recipe.read_toml(PROJECT / f"train_configs/{train_config}.toml")["machine"]
        for pattern in machine["intended_recipes"]:
            assert fnmatch.filter(RECIPES, pattern), f"{train_config}: {pattern}"


def test_two_variants_on_one_train_config_have_their_own_run_folders():
    variants = [config_registry.load(f"{name}@cpu").dump_folder for name in ("debug/ntp_debug", "debug/nitp_debug")]
    assert variants == ["outputs/debug/ntp_debug", "outputs/debug/nitp_debug"]


@pytest.mark.parametrize("mode", ["none", "selective", "full", "memory_budget"])
def test_the_resolved_recipe_gives_the_same_configuration_again(files, tmp_path, mode):
    policy = GOOD_TRAIN_CONFIG.replace('"none"', f'"{mode}"')
    text = """
    [parallelism]
    context_parallel_load_balancer = "none"
    [compile]
    enable = true
    [float8]
    emulate = true
    filter_fqns = ["lm_head", "nitp.projector"]
    [override]
    imports = ["nitp_titan.machine.cpu.dense_flex_attention"]
    [dataloader]
    subset = "en"
    [checkpoint]
    initial_load_path = "outputs/seed"
    """
    config = files("lr = 1e-3", "lr = 1e-3\nbetas = [0.8, 0.9]\n[debug]\nseed = 7", train_config=(policy, text))
    assert config.parallelism.context_parallel_load_balancer is None
    assert config.checkpoint.initial_load_path == str(Path("outputs/seed").absolute())
    write_resolved(config, tmp_path / "run")
    again = load_config(tmp_path / "run/resolved.toml", None)
    for field in dataclasses.fields(config):
        if field.name != "model_spec":
            assert getattr(again, field.name) == getattr(config, field.name), field.name
    assert (again.model_spec.name, again.model_spec.flavor) == (config.model_spec.name, config.model_spec.flavor)
    assert build.tables_of(again) == build.tables_of(config)
    with pytest.raises(UserError, match="needs no train config"):
        load_config(tmp_path / "run/resolved.toml", tmp_path / "machine.toml")


def test_every_section_of_torchtitan_is_reachable_from_toml(files):
    from torchtitan.trainer import Trainer

    tables = build.tables_of(files())
    for field in dataclasses.fields(Trainer.Config):
        if field.name != "model_spec":
            assert field.name in tables, field.name


def test_param_groups_can_be_given_in_full(files):
    groups = """param_groups = [
        {pattern = "nitp", optimizer_name = "AdamW", optimizer_kwargs = {lr = 2e-3}},
        {pattern = ".*", optimizer_name = "AdamW", optimizer_kwargs = {lr = 1e-3}},
    ]"""
    config = files("lr = 1e-3", groups)
    assert [group.optimizer_kwargs["lr"] for group in config.optimizer.param_groups] == [2e-3, 1e-3]
    with pytest.raises(UserError, match=r"param_groups\[0\] has no key 'patern'. Did you mean 'pattern'"):
        files("lr = 1e-3", groups.replace('pattern = "nitp"', 'patern = "nitp"'))


def test_recipes_are_read_without_torch():
    code = (
        "import sys\nfrom nitp_titan.config import recipe\n"
        "names = recipe.available('recipes')\n"
        "for name in names:\n"
        "    recipe.read_recipe(recipe.find(name, 'recipes'))\n"
        "assert names and 'torch' not in sys.modules and 'torchtitan' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=5)


def test_the_stock_registry_lists_recipes_and_knows_no_others():
    assert set(RECIPES) <= set(dir(config_registry))
    with pytest.raises(AttributeError):
        config_registry.__getattr__("debug/unknown")
    with pytest.raises(SystemExit, match="error: .*train_configs/moon.toml does not exist"):
        config_registry.__getattr__("debug/nitp_debug@moon")()


def test_the_project_s_own_files_are_found_from_another_folder_unless_it_has_its_own(tmp_path, monkeypatch, assets):
    def found():
        paths = (recipe.find("debug/nitp_debug", "recipes"), recipe.find("cpu", "train_configs"))
        tables = recipe.read_settings(*paths).tables
        return [
            tables[""]["hf_assets_path"],
            tables["dataloader"]["dataset_path"],
            tables["validator"]["dataloader"]["dataset_path"],
        ]

    relative = ["assets/stdlib", "assets/stdlib/train.jsonl", "assets/stdlib/validation.jsonl"]
    assert found() == relative
    monkeypatch.chdir(tmp_path)
    assert found() == [str(recipe.PROJECT / path) for path in relative]
    (tmp_path / "assets").mkdir()
    assert found() == relative


def test_every_sequence_of_thirteen_quickstart_batches_is_of_another_document():
    """Or its curves would follow the text: half a nat of NTP loss from one module to the next."""
    for variant in ("ntp", "nitp"):
        tables = recipe.read_recipe(recipe.find(f"debug/{variant}_quickstart", "recipes")).tables
        assert tables["dataloader"] == {"num_streams": 13 * tables["training"]["global_batch_size"], "shuffle": True}
