"""Reading recipes and train configs: the rule between them, mistakes, and the way back."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from nitp_titan import config_registry, recipe, schema
from nitp_titan.config import check_batch, UserError

PROJECT = Path(__file__).resolve().parent.parent
RECIPES = recipe.available("recipes")
TRAIN_CONFIGS = recipe.available("train_configs")

GOOD_RECIPE = """
[model]
family = "llama3"
flavor = "debug"
[training]
seq_len = 128
global_batch_size = 4
steps = 10
[optimizer]
lr = 1e-3
[nitp]
weight = 1.0
target_layer = 2
"""
GOOD_TRAIN_CONFIG = """
hf_assets_path = "assets/stdlib"
[training]
local_batch_size = 4
disable_cuda_graphs = true
[activation_checkpoint]
mode = "none"
"""


@pytest.fixture
def files(tmp_path):
    """Write a recipe and a train config with a text replaced, and load them."""

    def load(old="", new="", *, train_config=(GOOD_TRAIN_CONFIG, ""), extra=""):
        (tmp_path / "recipe.toml").write_text(GOOD_RECIPE.replace(old, new) + extra)
        (tmp_path / "machine.toml").write_text("".join(train_config))
        return recipe.load(tmp_path / "recipe.toml", tmp_path / "machine.toml")

    return load


def test_the_files_that_the_mistakes_below_start_from_are_right(files):
    config = files()
    assert (config.nitp.weight, config.nitp.target_layer, config.training.steps) == (1.0, 2, 10)
    assert config.activation_checkpoint is None
    assert config.optimizer.param_groups[0].optimizer_kwargs["lr"] == 1e-3


RECIPE_MISTAKES = {
    "unknown key": (
        "steps = 10",
        "steps = 10\nstepz = 3",
        r"recipe.toml: \[training\] has no key 'stepz'. Did you mean 'steps'",
    ),
    "unknown nitp key": (
        "weight = 1.0",
        "wieght = 1.0",
        r"recipe.toml: \[nitp\] has no key 'wieght'. Did you mean 'weight'\?",
    ),
    "wrong type": (
        "steps = 10",
        'steps = "ten"',
        r"recipe.toml: \[training\] steps = 'ten', but it must be an integer",
    ),
    "bool for a number": ("weight = 1.0", "weight = true", r"\[nitp\] weight = True, but it must be a number"),
    "float for an integer": (
        "target_layer = 2",
        "target_layer = 2.5",
        r"\[nitp\] target_layer = 2.5, but it must be an integer",
    ),
    "unknown choice": (
        "weight = 1.0",
        'weight = 1.0\nloss = "cosinus"',
        r"loss = 'cosinus', but it must be one of 'cosine', .* Did you mean 'cosine'",
    ),
    "choice of a wrong type": (
        "weight = 1.0",
        "weight = 1.0\ntemporal_shift = true",
        r"temporal_shift = True, but it must be one of 0, 1",
    ),
    "negative weight": (
        "weight = 1.0",
        "weight = -1.0",
        r"recipe.toml: \[nitp\] weight = -1.0, but it must be a finite number, at least 0",
    ),
    "infinite weight": ("weight = 1.0", "weight = inf", r"\[nitp\] weight = inf, but it must be a finite"),
    "target layer too deep": (
        "target_layer = 2",
        "target_layer = 25",
        r"recipe.toml: \[nitp\] target_layer = 25, but it must be 0 \(embedding\) to 4",
    ),
    "target layer missing": (
        "target_layer = 2",
        "",
        r"recipe.toml: \[nitp\] target_layer is missing; choose 0 .* here 1",
    ),
    "no projector width": (
        "weight = 1.0",
        "weight = 1.0\nprojector_width = 0",
        r"projector_width = 0.0, but it must be above 0",
    ),
    "negative start step": (
        "weight = 1.0",
        "weight = 1.0\nstart_step = -1",
        r"start_step = -1, but it must be at least 0",
    ),
    "no chunks": ("weight = 1.0", "weight = 1.0\nnum_chunks = 0", r"num_chunks = 0, but it must be at least 1"),
    "steps out of range": (
        "steps = 10",
        "steps = 0",
        r"recipe.toml: \[training\] steps = 0, but it must be at least 1",
    ),
    "negative learning rate": (
        "lr = 1e-3",
        "lr = -1.0",
        r"recipe.toml: \[optimizer\] lr = -1.0, but it must be above 0",
    ),
    "three betas": ("lr = 1e-3", "lr = 1e-3\nbetas = [0.9, 0.95, 0.99]", r"\[optimizer\] betas = .* two numbers"),
    "both optimizer forms": (
        "lr = 1e-3",
        'lr = 1e-3\n[[optimizer.param_groups]]\npattern = ".*"\noptimizer_name = "AdamW"',
        r"both param_groups and lr",
    ),
    "missing key": ("seq_len = 128", "", r"recipe.toml: \[training\] seq_len is missing"),
    "missing learning rate": ("lr = 1e-3", "", r"recipe.toml: \[optimizer\] lr is missing"),
    "unknown family": (
        '"llama3"',
        '"lama3"',
        r"recipe.toml: \[model\] family = 'lama3' is not registered. Did you mean 'llama3'",
    ),
    "unknown flavor": (
        '"debug"',
        '"debugg"',
        r"recipe.toml: \[model\] flavor = 'debugg' is unknown in llama3. Did you mean 'debug'",
    ),
    "table instead of a value": (
        "steps = 10",
        "[training.steps]\nx = 1",
        r"\[training\] steps = \{'x': 1\}, but it must be an integer",
    ),
    "invalid TOML": ("steps = 10", "steps = = 10", r"recipe.toml is not valid TOML: .*line 8"),
    "key of a train config": (
        "steps = 10",
        "steps = 10\nlocal_batch_size = 2",
        r"recipe.toml: \[training\] local_batch_size belongs to a train config, not to a recipe",
    ),
    "table of a train config": (
        "[optimizer]",
        "[compile]\nenable = true\n[optimizer]",
        r"\[compile\] enable belongs to a train config",
    ),
}

TRAIN_CONFIG_MISTAKES = {
    "key of a recipe": (
        "[nitp]\nweight = 1.0",
        r"machine.toml: \[nitp\] weight belongs to a recipe, not to a train config",
    ),
    "unknown table": ("[metric]\nlog_freq = 1", r"machine.toml: there is no table \[metric\]. Did you mean 'metrics'"),
    "unknown key": (
        "[metrics]\nlog_frequency = 1",
        r"machine.toml: \[metrics\] has no key 'log_frequency'. Did you mean 'log_freq'",
    ),
    "unknown nested key": (
        "[validator.dataloader]\ntext_feild = 'x'",
        r"machine.toml: \[validator.dataloader\] has no key 'text_feild'. Did you mean 'text_field'",
    ),
    "value for a table": (
        "[validator]\ndataloader = 3",
        r"machine.toml: \[validator.dataloader\] must be a table, not 3",
    ),
    "TorchTitan's own check": (
        "[checkpoint]\ninterval = 0",
        r"machine.toml: \[checkpoint\] Checkpoint interval needs to be at least 1",
    ),
    "log interval": ("[metrics]\nlog_freq = 0", r"machine.toml: \[metrics\] log_freq = 0, but it must be at least 1"),
    "parallel degree": (
        "[parallelism]\ntensor_parallel_degree = 0",
        r"tensor_parallel_degree = 0, but it must be at least 1",
    ),
    "list with a wrong entry": (
        "[compile]\ncomponents = ['model', 3]",
        r"\[compile\] components\[1\] = 3, but it must be a string",
    ),
    "backend": (
        "[parallelism]\nspmd_backend = 'partial_dtensor'",
        r"machine.toml: \[parallelism\] spmd_backend = 'partial_dtensor' .*NITP needs 'spmd_types'",
    ),
    "load balancer": (
        "[parallelism]\ncontext_parallel_degree = 2\ncontext_parallel_load_balancer = 'ptrr'",
        r"'ptrr' reorders tokens",
    ),
    "schedule": (
        "[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_schedule = 'ZBVZeroBubble'",
        r"ZBVZeroBubble': TorchTitan 0.3.0 loses",
    ),
}


@pytest.mark.parametrize("name", RECIPE_MISTAKES)
def test_a_mistake_in_a_recipe_is_named(files, name):
    old, new, message = RECIPE_MISTAKES[name]
    with pytest.raises(UserError, match=message):
        files(old, new)


@pytest.mark.parametrize("name", TRAIN_CONFIG_MISTAKES)
def test_a_mistake_in_a_train_config_is_named(files, name):
    text, message = TRAIN_CONFIG_MISTAKES[name]
    with pytest.raises(UserError, match=message):
        files(train_config=(GOOD_TRAIN_CONFIG, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("surprise = 1\n", "machine.toml: there is no key 'surprise'"),
        ("hf_assets_path = 3\n", "machine.toml: hf_assets_path = 3, but it must be a string"),
        ("extends = 'cpu.toml'\n", "machine.toml: extends = 'cpu.toml': only recipes do"),
        (
            "[activation_checkpoint]\nmode = 'selectve'\n",
            "mode = 'selectve', but it must be one of .* Did you mean 'selective'",
        ),
        ("[activation_checkpoint]\nmode = 'none'\ndebug = true\n", "debug has no meaning with mode = 'none'"),
    ],
)
def test_a_mistake_at_the_top_of_a_train_config_is_named(files, text, message):
    with pytest.raises(UserError, match=message):
        files(train_config=(text,))


def test_a_stop_gradient_that_would_cross_ranks_is_refused(files):
    machine = "[parallelism]\ncontext_parallel_degree = 2"
    with pytest.raises(UserError, match=r"recipe.toml: \[nitp\] stop_gradient = false works without"):
        files("weight = 1.0", "weight = 1.0\nstop_gradient = false", train_config=(GOOD_TRAIN_CONFIG, machine))


@pytest.mark.parametrize(
    ("machine", "num_ranks", "message"),
    [
        ("", 3, "global_batch_size = 4 is no multiple of local_batch_size = 4 times 3 data-parallel ranks"),
        ("[parallelism]\ntensor_parallel_degree = 2", 1, "needs tensor 2 = 2 ranks, but torchrun started 1"),
        ("[parallelism]\ndata_parallel_shard_degree = 2", 4, "needs shard 2 = 2 ranks, but torchrun started 4"),
        ("[loss]\nnum_chunks = 3", 1, r"\[loss\] num_chunks = 3 does not divide a rank's 128 / 1 positions"),
        (
            "[parallelism]\ncontext_parallel_degree = 4\n[loss]\nnum_chunks = 64",
            4,
            "64 does not divide a rank's 128 / 4",
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_ranks_is_refused(files, machine, num_ranks, message):
    config = files(train_config=(GOOD_TRAIN_CONFIG, machine))
    with pytest.raises(UserError, match=message):
        check_batch(config, num_ranks)


def test_extends_is_one_level_deep_and_stays_among_recipes(tmp_path):
    (tmp_path / "base.toml").write_text(GOOD_RECIPE)
    (tmp_path / "child.toml").write_text('extends = "base.toml"\n[nitp]\nweight = 0.5\n')
    (tmp_path / "grandchild.toml").write_text('extends = "child.toml"\n')
    (tmp_path / "lost.toml").write_text('extends = "bse.toml"\n')
    (tmp_path / "odd.toml").write_text("extends = 3\n")
    (tmp_path / "machine.toml").write_text(GOOD_TRAIN_CONFIG)
    config = recipe.load(tmp_path / "child.toml", tmp_path / "machine.toml")
    assert (config.nitp.weight, config.nitp.target_layer) == (0.5, 2)
    for name, message in {
        "grandchild": "one level only",
        "lost": r"lost.toml: extends = 'bse.toml': .*bse.toml does not exist. Did you mean '.*base.toml'",
        "odd": "extends = 3, but it must be the path",
    }.items():
        with pytest.raises(UserError, match=message):
            recipe.load(tmp_path / f"{name}.toml", tmp_path / "machine.toml")


def test_a_mistake_in_a_base_recipe_names_the_base(tmp_path):
    (tmp_path / "base.toml").write_text(GOOD_RECIPE.replace("steps = 10", "steps = 0"))
    (tmp_path / "child.toml").write_text('extends = "base.toml"\n')
    (tmp_path / "machine.toml").write_text(GOOD_TRAIN_CONFIG)
    with pytest.raises(UserError, match=r"base.toml: \[training\] steps = 0"):
        recipe.load(tmp_path / "child.toml", tmp_path / "machine.toml")


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


@pytest.mark.parametrize("train_config", TRAIN_CONFIGS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_loads_on_every_train_config(name, train_config):
    config = config_registry.load(f"{name}@{train_config}")
    assert config.nitp.enabled == ("nitp" in name)


@pytest.mark.parametrize("name", [name for name in RECIPES if "nitp" in name])
def test_an_nitp_recipe_differs_from_its_baseline_in_the_nitp_table_alone(name):
    path = PROJECT / "recipes" / f"{name}.toml"
    assert set(recipe.read_toml(path)) == {"extends", "nitp"}


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
    imports = ["nitp_titan.cpu.dense_flex_attention"]
    [dataloader]
    subset = "en"
    [checkpoint]
    initial_load_path = "outputs/seed"
    """
    config = files("lr = 1e-3", "lr = 1e-3\nbetas = [0.8, 0.9]\n[debug]\nseed = 7", train_config=(policy, text))
    assert config.parallelism.context_parallel_load_balancer is None
    assert config.checkpoint.initial_load_path == str(Path("outputs/seed").absolute())
    recipe.write_resolved(config, tmp_path / "run")
    again = recipe.load(tmp_path / "run/resolved.toml", None)
    for field in dataclasses.fields(config):
        if field.name != "model_spec":
            assert getattr(again, field.name) == getattr(config, field.name), field.name
    assert (again.model_spec.name, again.model_spec.flavor) == (config.model_spec.name, config.model_spec.flavor)
    assert schema.to_tables(again) == schema.to_tables(config)
    with pytest.raises(UserError, match="needs no train config"):
        recipe.load(tmp_path / "run/resolved.toml", tmp_path / "machine.toml")


def test_every_section_of_torchtitan_is_reachable_from_toml(files):
    from torchtitan.trainer import Trainer

    tables = schema.to_tables(files())
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
        "import sys\nfrom nitp_titan import recipe\n"
        "names = recipe.available('recipes')\n"
        "for name in names:\n"
        "    recipe.read_settings(recipe.find(name, 'recipes'), recipe.find('cpu', 'train_configs'))\n"
        "assert names and 'torch' not in sys.modules and 'torchtitan' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=5)


def test_the_stock_registry_lists_recipes_and_knows_no_others():
    assert set(RECIPES) <= set(dir(config_registry))
    with pytest.raises(AttributeError):
        config_registry.__getattr__("debug/unknown")
    with pytest.raises(SystemExit, match="error: .*train_configs/moon.toml does not exist"):
        config_registry.__getattr__("debug/nitp_debug@moon")()
