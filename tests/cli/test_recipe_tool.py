"""scripts/recipe.py: listing, showing, comparing, and checking at full size."""

import json
import subprocess
import sys

import pytest
from processes import warm_python

from nitp_titan.cli import catalog
from nitp_titan.config import recipe
from nitp_titan.sizing import meta_check

PROJECT = recipe.PROJECT


def _tool(*arguments, start=None):
    """The command in a new process, or as ``start`` starts it."""
    command = ["scripts/recipe.py", *arguments]
    if start is not None:
        return start(*command, cwd=PROJECT)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=PROJECT)


def _check(pairs):
    """`meta_check.check` in a process of its own: this one may have a process group."""
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from nitp_titan.sizing import meta_check\n"
        "pairs = [tuple(map(Path, pair)) for pair in json.loads(sys.argv[1])]\n"
        "print(json.dumps([*meta_check.check(pairs)]))\n"
    )
    names = json.dumps([[str(path) for path in pair] for pair in pairs])
    done = warm_python("-c", code, names, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_list_names_every_recipe():
    done = _tool("list", "--json")
    assert done.returncode == 0, done.stderr
    entries = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert sorted(entries) == recipe.available("recipes")
    assert entries["moe/nitp_9b_a1b"] == {
        "name": "moe/nitp_9b_a1b",
        "model": "moe 9B-A1B",
        "objective": "nitp 0.8 @ 5",
        "tokens": 39_339 * 1024 * 8192,
        "steps": 39_339,
        "source": "paper Table 4, column MoE 9b-A1b",
    }
    text = _tool("list").stdout
    assert all(name in text for name in entries)


def test_show_merges_the_base_and_with_a_train_config_resolves_everything():
    shown = json.loads(_tool("show", "moe/nitp_9b_a1b", "--json").stdout)
    assert shown["nitp"] == {"weight": 0.8, "target_layer": 5}
    assert shown["training"]["steps"] == 39_339 and "local_batch_size" not in shown["training"]
    resolved = json.loads(_tool("show", "moe/nitp_9b_a1b", "h100x64_ep", "--json", start=warm_python).stdout)
    assert resolved["training"]["local_batch_size"] == 4
    assert resolved["parallelism"]["expert_parallel_degree"] == 8
    assert resolved["nitp"]["projector_width"] == 4.0
    assert resolved["dump_folder"] == "outputs/moe/nitp_9b_a1b"


def test_diff_shows_only_what_differs_defaults_included():
    differing = json.loads(_tool("diff", "moe/nitp_3b_a0.5b", "ablations/loss_mse", "--json").stdout)
    assert differing == {"[nitp] loss": ["cosine", "mse"]}
    assert "[nitp] loss" in _tool("diff", "moe/nitp_3b_a0.5b", "ablations/loss_mse").stdout
    assert _tool("diff", "dense/ntp_3b", "dense/ntp_3b").stdout == "no difference\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "moe/nitp_9b"], "moe/nitp_9b.toml does not exist. Did you mean"),
        (["check", "moe/nitp_9b_a1b", "h100x65"], "h100x65.toml does not exist"),
        (["diff", "moe/nitp_9b_a1b", "moe/nitp"], "moe/nitp.toml does not exist"),
    ],
)
def test_a_name_that_is_not_there_is_one_line(arguments, message):
    done = _tool(*arguments)
    assert done.returncode == 1 and message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_check_counts_and_exits_non_zero_when_one_fails(tmp_path):
    good = _tool("check", "moe/nitp_45b_a5.5b", "h100x128_pp", "--json", start=warm_python)
    assert good.returncode == 0, good.stderr
    (result,) = json.loads(good.stdout)
    assert (result["ranks"], result["data_parallel_ranks"], result["accumulation_steps"]) == (128, 16, 3)
    states = result["rank_bytes"]
    assert states["total"] == 16 * result["rank_parameters"] == sum(states.values()) - states["total"]
    # The largest of four stages holds more than a fair share, and less than two.
    fair = (result["parameters"] + result["projector_parameters"]) / 128
    assert fair < result["rank_parameters"] < 2 * fair
    text = (PROJECT / "train_configs/h100x128_pp.toml").read_text()
    (tmp_path / "odd.toml").write_text(text.replace("expert_parallel_degree = 8", "expert_parallel_degree = 32"))
    shown = catalog.report(result)
    assert "source      paper App. C, column MoE 45b-A5.5b (arXiv v1 only, dropped by the authors in v2)" in shown
    bad = _tool("check", "moe/nitp_45b_a5.5b", str(tmp_path / "odd.toml"), start=warm_python)
    assert bad.returncode == 1 and "0 of 1 checks passed" in bad.stdout
    assert "expert_parallel_degree = 32 does not divide the model's 144 experts" in bad.stdout


def test_a_check_does_not_inherit_the_callers_process_group(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="without a torch.distributed process group"):
        next(meta_check.check([]))


@pytest.fixture(scope="module")
def all_checks():
    done = _tool("check", "--all", "--json")
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_every_recipe_passes_on_every_train_config_meant_for_it(all_checks):
    assert [result for result in all_checks if "error" in result] == []
    checked = {result["recipe"] for result in all_checks}
    assert checked == {str(recipe.find(name, "recipes")) for name in recipe.available("recipes")}
    meant = {result["train_config"] for result in all_checks}
    assert meant == {str(recipe.find(name, "train_configs")) for name in recipe.available("train_configs")}


def test_no_check_takes_more_than_ten_seconds_or_two_gigabytes(all_checks):
    assert max(result["seconds"] for result in all_checks) < 10
    assert max(result["memory_gib"] for result in all_checks) < 2


def test_local_batch_ranks_and_accumulation_make_the_global_batch(all_checks):
    for result in all_checks:
        product = result["local_batch_size"] * result["data_parallel_ranks"] * result["accumulation_steps"]
        assert product == result["global_batch_size"], result["recipe"]


def test_one_rank_holds_the_whole_model_and_sharding_divides_it(all_checks):
    ladder = next(r for r in all_checks if "nitp_150m" in r["recipe"] and "h100x1." in r["train_config"])
    assert ladder["rank_parameters"] == ladder["parameters"] + ladder["projector_parameters"]
    node = next(r for r in all_checks if "nitp_150m" in r["recipe"] and "h100x8." in r["train_config"])
    assert node["rank_parameters"] == pytest.approx(ladder["rank_parameters"] / 8, rel=0.01)


REFUSED = {
    "heads": (
        "dense/ntp_0.5b",
        4,
        "tensor_parallel_degree = 4",
        "tensor_parallel_degree = 4 does not divide the model's n_heads = 14",
    ),
    "kv heads": (
        "dense/ntp_3b",
        10,
        "tensor_parallel_degree = 10\nenable_sequence_parallel = false",
        "tensor_parallel_degree = 10 does not divide the model's n_kv_heads = 4",
    ),
    "experts": ("moe/ntp_3b_a0.5b", 32, "expert_parallel_degree = 32", "32 does not divide the model's 144 experts"),
    "no experts": ("dense/ntp_3b", 8, "expert_parallel_degree = 8", "3B has no experts"),
    "expert ranks": ("moe/ntp_3b_a0.5b", 8, "expert_parallel_degree = 16", "16 does not divide the 8 ranks"),
    "sequence": ("dense/ntp_3b", 128, "context_parallel_degree = 128", "8192 is not a multiple of CP 128 x 128"),
    "batch": ("moe/ntp_1.9b_a0.3b", 96, "tensor_parallel_degree = 1", "the ranks themselves do not divide it"),
    "local batch": (
        "moe/ntp_1.9b_a0.3b",
        64,
        "tensor_parallel_degree = 1\n[training]\nlocal_batch_size = 3",
        "choose one of 1, 2, 4",
    ),
    "ranks": (
        "dense/ntp_3b",
        6,
        "tensor_parallel_degree = 4",
        "needs tensor 4 = 4 ranks or a multiple, but there are 6",
    ),
    "tied": (
        "dense/ntp_3b",
        4,
        "pipeline_parallel_degree = 4\n[training]\nlocal_batch_size = 4",
        "3B ties embedding and unembedding",
    ),
    "stages": ("moe/ntp_45b_a5.5b", 32, "pipeline_parallel_degree = 32", "too few for the 32 stages"),
    "graphs": (
        "moe/ntp_45b_a5.5b",
        8,
        "expert_parallel_degree = 8\n[training]\ndisable_cuda_graphs = false",
        "CUDA graphs support only expert parallel",
    ),
    "memory": (
        "scaling/ntp_13b",
        1,
        "tensor_parallel_degree = 1",
        "device_memory_gib = 80, but parameters, gradients and optimizer states of one rank take 194.0 GiB",
    ),
    "dispatcher": (
        "dense/ntp_3b",
        8,
        'tensor_parallel_degree = 1\n[model]\nmoe_comm_backend = "deepep"',
        "llama3 3B has no experts",
    ),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    folder, pairs = tmp_path_factory.mktemp("refused"), []
    for index, (name, ranks, settings, _) in enumerate(REFUSED.values()):
        path = folder / f"{index}.toml"
        graphs = "" if "disable_cuda_graphs" in settings else "disable_cuda_graphs = true\n"
        training = "" if "[training]" in settings else "[training]\nlocal_batch_size = 1\n"
        if "[training]" in settings:
            settings, graphs = settings.replace("[training]\n", f"[training]\n{graphs}"), ""
        machine = f"[machine]\nnum_ranks = {ranks}\ndevice = 'H100'\ndevice_memory_gib = 80\n"
        path.write_text(f"{machine}[parallelism]\n{settings}\n{training}{graphs}")
        pairs.append((recipe.find(name, "recipes"), path))
    return dict(zip(REFUSED, _check(pairs)))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(refusals, case):
    assert REFUSED[case][-1] in refusals[case].get("error", "passed")


def test_the_long_context_config_takes_sixteen_times_the_context(tmp_path):
    """The flags that its head recommends, as a recipe."""
    text = recipe.find("dense/ntp_3b", "recipes").read_text()
    long = text.replace("seq_len = 8192", "seq_len = 131072").replace("batch_size = 1024", "batch_size = 32")
    (tmp_path / "long.toml").write_text(long)
    machine = recipe.find("h100x8_cp", "train_configs")
    assert "--training.seq_len 131072 --training.global_batch_size 32" in machine.read_text()
    (result,) = _check([(tmp_path / "long.toml", machine)])
    assert "error" not in result, result["error"]
    assert (result["seq_len"], result["accumulation_steps"], result["data_parallel_ranks"]) == (131072, 32, 1)
