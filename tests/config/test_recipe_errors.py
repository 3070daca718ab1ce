"""Mistakes in recipes and train configs: each is refused with a message that names it."""

import pytest
from recipe_files import GOOD_RECIPE, GOOD_TRAIN_CONFIG

from nitp_titan.config import recipe
from nitp_titan.config.parallelism import check_parallelism
from nitp_titan.errors import UserError

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
        r"loss = 'cosinus', but it must be one of cosine, .* Did you mean 'cosine'",
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
        r"recipe.toml: \[model\] family = 'lama3' is neither registered nor .* Did you mean 'llama3'",
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
    "invalid TOML": ("steps = 10", "steps = = 10", r"recipe.toml is not valid TOML: .*line 9"),
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
    "order of the data": (
        "[dataloader]\nnum_streams = 8",
        r"machine.toml: \[dataloader\] num_streams belongs to a recipe, not to a train config",
    ),
    "key of before": (
        "[dataloader]\nnum_shards = 8",
        r"machine.toml: \[dataloader\] has no key 'num_shards'. Did you mean 'num_streams'",
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
        ("", 3, "local_batch_size = 4 times 3 data-parallel ranks does not divide global_batch_size = 4"),
        ("[parallelism]\ntensor_parallel_degree = 2", 1, "needs tensor 2 = 2 ranks or a multiple, but there are 1"),
        ("[parallelism]\ndata_parallel_shard_degree = 2", 4, "needs shard 2 = 2 ranks, but there are 4"),
        ("[loss]\nnum_chunks = 3", 1, r"\[loss\] num_chunks = 3 does not divide a rank's 128 / 1 positions"),
        ("[parallelism]\ncontext_parallel_degree = 4", 4, "seq_len = 128 is not a multiple of CP 4 x 128"),
    ],
)
def test_a_layout_that_does_not_fit_the_ranks_is_refused(files, machine, num_ranks, message):
    config = files(train_config=(GOOD_TRAIN_CONFIG, machine))
    with pytest.raises(UserError, match=message):
        check_parallelism(config, num_ranks)


def test_a_key_that_no_file_sets_is_not_looked_for_in_a_file_of_the_other_kind(tmp_path):
    (tmp_path / "recipe.toml").write_text(GOOD_RECIPE)
    (tmp_path / "machine.toml").write_text(GOOD_TRAIN_CONFIG + '[dataloader]\ndataset_path = "text.jsonl"\n')
    settings = recipe.read_settings(tmp_path / "recipe.toml", tmp_path / "machine.toml")
    assert settings.location("dataloader", "num_streams") == ""
    assert settings.location("dataloader", "streaming") == f"{tmp_path}/machine.toml: "
    assert settings.location("training", "max_norm") == f"{tmp_path}/recipe.toml: "
