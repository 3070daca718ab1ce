"""The recipes hold the paper: Table 4 and App. C number by number, sizes, steps, FLOPs and ablations."""

import dataclasses
import functools

import pytest

from nitp_titan.cli import catalog
from nitp_titan.config import recipe
from nitp_titan.sizing import meta_check
from nitp_titan.training.trainer import load_config

# Typed from the paper (Table 4, App. C): learning rate, sequences per batch, tokens / 1e9, hidden dim, layers,
# head dim, query heads, KV heads, routed experts, shared experts, top-k, dense FFN, expert FFN, target layer, weight.
TABLE = {
    "moe/{}_1.9b_a0.3b": (6.0e-4, 256, 105, 512, 16, 64, 8, 4, 144, 1, 8, 10944, 496, 3, 1.0),
    "moe/{}_3b_a0.5b": (8.7e-4, 512, 200, 768, 17, 96, 8, 4, 144, 1, 8, 10944, 544, 4, 1.0),
    "moe/{}_9b_a1b": (4.2e-4, 1024, 330, 1280, 24, 160, 8, 4, 144, 1, 8, 10944, 640, 5, 0.8),
    "moe/{}_45b_a5.5b": (2.8e-4, 768, 240, 3072, 24, 128, 24, 8, 144, 1, 12, 12288, 1408, 5, 0.6),
    "dense/{}_0.5b": (4.2e-4, 512, 200, 896, 24, 64, 14, 2, None, None, None, 4864, None, 5, 1.0),
    "dense/{}_2b": (4.2e-4, 1024, 330, 1792, 28, 128, 14, 2, None, None, None, 10752, None, 6, 1.0),
    "dense/{}_3b": (4.2e-4, 1024, 330, 2560, 28, 128, 20, 4, None, None, None, 10240, None, 6, 0.8),
}
STEPS = dict(zip(TABLE, (50_068, 47_684, 39_339, 38_147, 47_684, 39_339, 39_339)))
# Parameters in billions before norms: total, activated with both embeddings.
SIZES = {
    "moe/{}_1.9b_a0.3b": (1.843, 0.289),
    "moe/{}_3b_a0.5b": (3.198, 0.471),
    "moe/{}_9b_a1b": (8.750, 1.062),
    "moe/{}_45b_a5.5b": (44.94, 5.54),
    "dense/{}_0.5b": (0.494, 0.494),
    "dense/{}_2b": (2.096, 2.096),
    "dense/{}_3b": (3.032, 3.032),
}
VARIANTS = [(name, name.format(variant)) for name in TABLE for variant in ("ntp", "nitp")]
COMMON = {
    "optimizer": {"betas": [0.9, 0.95], "weight_decay": 0.1},
    "training": {"seq_len": 8192, "max_norm": 1.0},
    "lr_scheduler": {"warmup_steps": 2000, "decay_ratio": 0.2},
}
VOCABULARY = 152_064

# Key and value by which each ablation differs from the default, and the average that the paper reports.
ABLATIONS = {
    **{
        f"target_layer_{k}": ("target_layer", k, v)
        for k, v in {0: 20.72, 2: 22.01, 6: 22.12, 8: 21.22, 14: 22.16}.items()
    },
    "9b_target_layer_4": ("target_layer", 4, 30.05),
    "9b_target_layer_6": ("target_layer", 6, 29.80),
    "no_temporal_shift": ("temporal_shift", 0, 18.75),
    "loss_mse": ("loss", "mse", 19.38),
    "loss_smooth_l1": ("loss", "smooth_l1", 23.24),
    "loss_kl": ("loss", "kl", 22.88),
    "cosine_regularizer": ("objective", "cosine_regularizer", 20.79),
    "no_stop_gradient": ("stop_gradient", False, 18.23),
    **{f"start_step_{k}": ("start_step", k, v) for k, v in {1000: 21.22, 2000: 21.40, 3000: 20.17}.items()},
    "no_projector": ("projector", "none", 20.64),
    **{f"weight_{k}": ("weight", k, v) for k, v in {0.6: 32.4, 0.8: 32.0, 1.2: 33.2, 1.4: 31.0}.items()},
}


@functools.cache
def _config(name):
    return load_config(recipe.find(name, "recipes"), recipe.find(catalog.machines_for(name)[0], "train_configs"))


@functools.cache
def _counts(name):
    return meta_check.counts_of(
        recipe.find(name, "recipes"), recipe.find(catalog.machines_for(name)[0], "train_configs")
    )


def _tables(name):
    return recipe.read_recipe(recipe.find(name, "recipes")).tables


@pytest.mark.parametrize(("row", "name"), VARIANTS)
def test_every_number_of_the_papers_table_is_in_the_recipe(row, name):
    (lr, batch, _, dim, layers, head_dim, heads, kv_heads, experts, shared, top_k, ffn, expert_ffn, target, weight) = (
        TABLE[row]
    )
    tables, model = _tables(name), _config(name).model_spec.model
    assert tables["optimizer"]["lr"] == lr
    assert tables["training"]["global_batch_size"] == batch
    for table, values in COMMON.items():
        assert {key: tables[table][key] for key in values} == values
    assert tables["lr_scheduler"]["decay_type"] == ("exponential" if "45b" in name else "linear")
    if "nitp" in name:
        assert tables["nitp"] == {"weight": weight, "target_layer": target}
    assert (model.dim, model.vocab_size, len(model.layers)) == (dim, VOCABULARY, layers)
    assert model.enable_weight_tying == (experts is None)
    for index, layer in enumerate(model.layers):
        attention = layer.attention
        assert (attention.n_heads, attention.n_kv_heads) == (heads, kv_heads)
        assert (attention.head_dim or attention.dim // attention.n_heads) == head_dim
        if experts is None or index == 0:
            assert layer.moe is None and layer.feed_forward.w1.out_features == ffn
        else:
            _check_experts(layer, experts, shared, top_k, expert_ffn)


def _check_experts(layer, experts, shared, top_k, expert_ffn):
    router, routed = layer.moe.router, layer.moe.routed_experts.inner_experts
    assert layer.feed_forward is None
    assert (router.num_experts, routed.num_experts, router.top_k) == (experts, experts, top_k)
    assert (router.score_func, router.route_norm, layer.moe.load_balance_coeff) == ("softmax", True, 1e-3)
    assert routed.hidden_dim == expert_ffn
    assert layer.moe.shared_experts.w1.out_features == shared * expert_ffn


@pytest.mark.parametrize(("row", "name"), VARIANTS)
def test_steps_follow_from_the_papers_tokens(row, name):
    batch, tokens = TABLE[row][1:3]
    steps = _tables(name)["training"]["steps"]
    assert steps == STEPS[row] == round(tokens * 1e9 / (batch * 8192))


@pytest.mark.parametrize("row", TABLE)
def test_sizes_come_out_as_the_names_say(row):
    counts = _counts(row.format("nitp"))
    total, activated = SIZES[row]
    assert counts.parameters == pytest.approx(total * 1e9, rel=3e-3)
    assert counts.activated_parameters == pytest.approx(activated * 1e9, rel=3e-3)
    # App. G.2: the projector has 12 d^2 parameters, and the deployed model is the baseline's.
    assert counts.projector_parameters == 12 * TABLE[row][3] ** 2
    assert counts.parameters == _counts(row.format("ntp")).parameters


def _flops_of_app_g(row) -> tuple[float, float]:
    """Baseline and NITP FLOPs per token by App. G's formula, with the model's own layers.

    The paper's `L (18 d^2 + 18 k d d_e) + 6 V d` takes KV heads for half of the query heads and every
    layer for an MoE layer. Here attention has its KV share, the dense layer its width, and the router counts.
    """
    _, _, _, d, layers, _, heads, kv_heads, experts, _, top_k, ffn, expert_ffn, _, _ = TABLE[row]
    attention = layers * 6 * d**2 * (2 + 2 * kv_heads / heads)
    dense_layers = layers if experts is None else 1
    dense = dense_layers * 18 * d * ffn
    moe = 0 if experts is None else (layers - 1) * (18 * (top_k + 1) * d * expert_ffn + 6 * d * experts)
    return attention + dense + moe + 6 * VOCABULARY * d, 72 * d**2 + 18 * d


@pytest.mark.parametrize("row", TABLE)
def test_counted_flops_agree_with_the_formula_of_app_g(row):
    counts = _counts(row.format("nitp"))
    baseline, nitp = _flops_of_app_g(row)
    assert counts.flops == pytest.approx(baseline, rel=0.01)
    assert counts.nitp_flops == pytest.approx(nitp, rel=0.01)
    assert counts.nitp_overhead == pytest.approx(nitp / baseline, rel=0.01)


def test_the_9b_overhead_is_the_papers():
    counts = _counts("moe/nitp_9b_a1b")
    assert counts.nitp_flops == pytest.approx(1.18e8, rel=0.01)
    assert f"{counts.nitp_overhead:.1%}" == "2.3%"
    # The literal formula counts the leading dense layer as a narrower MoE layer: 5.06e9.
    assert counts.flops == pytest.approx(5.06e9, rel=0.03)


def test_every_ablation_is_there_and_differs_from_the_default_only_in_its_own_key():
    names = [name for name in recipe.available("recipes") if name.startswith("ablations/")]
    assert sorted(names) == sorted(f"ablations/{name}" for name in ABLATIONS)
    for name, (key, value, average) in ABLATIONS.items():
        default = "moe/nitp_9b_a1b" if name.startswith("9b") else "moe/nitp_3b_a0.5b"
        differing = catalog.difference(_tables(default), _tables(f"ablations/{name}"))
        assert {setting: values[1] for setting, values in differing.items()} == {f"[nitp] {key}": value}
        expected = catalog.header(recipe.find(f"ablations/{name}", "recipes"))["Expect"]
        assert expected.startswith(str(average)) or expected.startswith(f"{average:.2f}")


@pytest.mark.parametrize("name", [name for name in recipe.available("recipes") if "/nitp_" in name])
def test_an_nitp_recipe_is_its_baseline_plus_the_nitp_table(name):
    assert set(recipe.read_toml(recipe.find(name, "recipes"))) == {"extends", "nitp"}
    differing = catalog.difference(_tables(name.replace("/nitp_", "/ntp_")), _tables(name))
    assert set(differing) == {"[nitp] weight", "[nitp] target_layer"}


@pytest.mark.parametrize("name", ["7b", "8b", "13b", "50m", "150m"])
def test_the_scaling_recipes_train_20_tokens_per_parameter_and_target_a_fifth_of_the_depth(name):
    tables, counts = _tables(f"scaling/nitp_{name}"), _counts(f"scaling/nitp_{name}")
    training, layers = tables["training"], len(_config(f"scaling/nitp_{name}").model_spec.model.layers)
    tokens = training["steps"] * training["global_batch_size"] * training["seq_len"]
    assert tokens / counts.parameters == pytest.approx(20, rel=0.05)
    assert 0.15 <= tables["nitp"]["target_layer"] / layers <= 0.25
    assert tables["nitp"]["weight"] in (0.6, 0.8, 1.0)
    size = float(name[:-1]) * (1e6 if name[-1] == "m" else 1e9)
    assert counts.parameters == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("name", recipe.available("recipes"))
def test_a_recipes_head_tells_source_command_cost_and_what_to_expect(name):
    head = catalog.header(recipe.find(name, "recipes"))
    assert set(head) == set(catalog.LABELS)
    assert f"--recipe recipes/{name}.toml" in head["Run"]
    if name.startswith(("debug/", "study/", "overhead/")):
        return
    machine = head["Run"].partition("train_configs/")[2].removesuffix(".toml")
    assert machine in catalog.machines_for(name)
    config = _config(name)
    tokens = config.training.steps * config.training.global_batch_size * config.training.seq_len
    hours = meta_check.device_hours(_counts(name), tokens, "H100")
    stated = float(head["Cost"].split()[1].replace(",", ""))
    assert stated == pytest.approx(hours, rel=0.06)
    launched = {"torchrun --nproc_per_node 8": 8, "torchrun --nproc_per_node 1": 1}
    ranks = next((n for start, n in launched.items() if head["Run"].startswith(start)), None)
    if ranks is None:
        ranks = 8 * int(head["Run"].removeprefix("sbatch --nodes ").split()[0])
    assert ranks == recipe.read_toml(recipe.find(machine, "train_configs"))["machine"]["num_ranks"]


def test_the_table_of_all_recipes_is_current():
    path = recipe.PROJECT / "recipes/README.md"
    text = path.read_text(encoding="utf-8")
    assert catalog.readme(text, meta_check.counts_of) == text, "run `python scripts/recipe.py table`"


_OF_THE_45B = ("45b-a5.5b", "45b_a5.5b", "45b_")


def test_every_line_on_the_45b_says_that_only_arxiv_v1_has_it():
    """App. C of v1; the authors dropped the model in v2."""
    pages = [path for path in recipe.PROJECT.rglob("*.md") if not {".venv", "outputs"} & {*path.parts}]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    names = [name for name in recipe.available("recipes") if "45b" in name]
    lines += [f"{catalog.entry(name).model}: {catalog.entry(name).source}" for name in names]
    spoken = [line for line in lines if "45b" in line.lower()]
    assert len(spoken) >= 9
    assert [line for line in spoken if "arXiv v1 only" not in line] == []


def test_every_file_on_the_45b_says_that_only_arxiv_v1_has_it():
    folders = [recipe.PROJECT / name for name in ("recipes", "train_configs", "nitp_titan")]
    files = [path for folder in folders for path in folder.rglob("*")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".toml")}
    about = [path for path, text in texts.items() if any(name in text.lower() for name in _OF_THE_45B)]
    assert len(about) >= 4
    assert [str(path) for path in about if "arXiv v1 only" not in texts[path]] == []


def test_counts_are_plain_numbers():
    assert all(type(value) is int for value in dataclasses.asdict(_counts("moe/nitp_9b_a1b")).values())
