"""NITP's cost on the paper's models at full size, counted on fake tensors and by hand from the paper's tables."""

import json

import pytest
import torch
import torch.distributed as dist
from overhead import counted
from overhead.full_size import Case, count_all
from processes import warm_python
from torchtitan.models.common import RMSNorm

from nitp_titan.config import recipe
from nitp_titan.sizing import kernels
from nitp_titan.sizing.model_size import paper_flops
from nitp_titan.training.trainer import load_config

# The paper's Table 4.
V, LENGTH = 152064, 8192
DENSE = dict(dim=896, layers=24, hidden=4864, kv_dim=128)
MOE = dict(dim=512, layers=16, dense_hidden=10944, expert_hidden=496, experts=144, used=8 + 1, kv_dim=256)
FLOPS_BAR, MEMORY_BAR = 0.001, 0.02

_ALL = """
import json, sys
sys.path.insert(0, "scripts")
from nitp_titan.sizing.trace import as_rows
from overhead.full_size import Case, count_all

given = json.loads(sys.argv[1])
cases = {name: [Case(variant=variant, **case) for variant in ("NTP", "NITP")] for name, case in given.items()}
results = count_all([case for pair in cases.values() for case in pair], log=lambda line: None)
stats = lambda r: {
    "matmul_flops": r.cost.matmul_flops, "attention_flops": r.cost.attention_flops, "peak_bytes": r.cost.peak_bytes,
    "prefetched": r.cost.prefetched_gathers, "collectives": as_rows(r.cost.collectives), "counts": vars(r.counts),
    "paper": [r.paper_flops, r.paper_nitp_flops], "state_bytes": r.state_bytes,
}
print(json.dumps({name: {variant: stats(next(results)) for variant in ("NTP", "NITP")} for name in cases}))
"""
_SHALLOW = {"recipe": "dense/nitp_3b", "seq_len": 2048, "shape": {"n_layers": 6}}
CASES = {
    "dense": {"recipe": "dense/nitp_0.5b"},
    "moe": {"recipe": "moe/nitp_1.9b_a0.3b"},
    # Where NITP's memory weighs most: the widest projector beside the smallest activations.
    "worst": {"recipe": "dense/nitp_3b", "checkpointing": "full"},
    "replicas": {**_SHALLOW, "num_ranks": 16, "parallelism": {"data_parallel_replicate_degree": 2}},
    "deeper": {
        **_SHALLOW,
        "shape": {"n_layers": 8},
        "num_ranks": 16,
        "parallelism": {"data_parallel_replicate_degree": 2},
    },
    "tp": {**_SHALLOW, "parallelism": {"tensor_parallel_degree": 4}},
    "cp": {**_SHALLOW, "num_ranks": 16, "parallelism": {"context_parallel_degree": 8}},
}


@pytest.fixture(scope="module")
def stats():
    """Of NTP and NITP by name of the case; in a process of its own, as this one may have a process group."""
    run = warm_python("-c", _ALL, json.dumps(CASES))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def _added(pair: dict) -> dict[tuple[str, str], tuple[int, int]]:
    """(calls, bytes) that NITP adds, by kind and mesh axis."""
    sides = [{(row["kind"], row["group"]): row for row in pair[variant]["collectives"]} for variant in ("NITP", "NTP")]
    found = {}
    for place in {*sides[0], *sides[1]}:
        nitp, ntp = (side.get(place, {"calls": 0, "payload": 0}) for side in sides)
        difference = nitp["calls"] - ntp["calls"], nitp["payload"] - ntp["payload"]
        if difference != (0, 0):
            found[place] = difference
    return found


def test_products_of_the_dense_model_are_six_per_parameter_used(stats):
    d, kv, hidden = DENSE["dim"], DENSE["kv_dim"], DENSE["hidden"]
    layer = 2 * d * d + 2 * d * kv + 3 * d * hidden
    ntp, nitp = (stats["dense"][variant]["matmul_flops"] / LENGTH for variant in ("NTP", "NITP"))
    assert ntp == 6 * (DENSE["layers"] * layer + V * d)
    assert nitp - ntp == 6 * 12 * d * d


def test_products_of_the_moe_model_are_six_per_parameter_used(stats):
    d, kv = MOE["dim"], MOE["kv_dim"]
    attention = 2 * d * d + 2 * d * kv
    dense = 3 * d * MOE["dense_hidden"]
    experts = 3 * d * MOE["expert_hidden"] * MOE["used"] + d * MOE["experts"]
    ntp, nitp = (stats["moe"][variant]["matmul_flops"] / LENGTH for variant in ("NTP", "NITP"))
    assert ntp == 6 * (MOE["layers"] * attention + dense + (MOE["layers"] - 1) * experts + V * d)
    assert nitp - ntp == 6 * 12 * d * d


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_counted_products_are_those_of_the_built_model(stats, model):
    for variant in ("NTP", "NITP"):
        found = stats[model][variant]
        assert found["matmul_flops"] / LENGTH == found["counts"]["flops"] + found["counts"]["nitp_flops"]


@pytest.mark.parametrize("model, dim", [("dense", DENSE), ("moe", MOE)])
def test_attention_is_counted_whole(stats, model, dim):
    # Scores and values; backward: the scores again, and two products for each of them. Heads together are as wide as d.
    expected = dim["layers"] * (2 + 5) * 2 * LENGTH * LENGTH * dim["dim"]
    assert stats[model]["NTP"]["attention_flops"] == stats[model]["NITP"]["attention_flops"] == expected


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_overhead_is_that_of_the_paper_within_a_tenth_of_a_point(stats, model):
    ntp, nitp = (stats[model][variant]["matmul_flops"] for variant in ("NTP", "NITP"))
    backbone, added = stats[model]["NITP"]["paper"]
    assert abs((nitp / ntp - 1) - added / backbone) < FLOPS_BAR


@pytest.mark.parametrize("name", counted.MODELS)
def test_overhead_of_every_model_is_that_of_the_paper_within_a_tenth_of_a_point(name):
    """From the counts of the built model, which equal those of the traced step."""
    from nitp_titan.sizing import meta_check

    path, machine = recipe.find(counted.MODELS[name], "recipes"), recipe.find("h100x8", "train_configs")
    counts = meta_check.counts_of(path, machine)
    backbone, added = paper_flops(load_config(path, machine).model_spec.model)
    assert abs(counts.nitp_overhead - added / backbone) < FLOPS_BAR


def test_the_formula_gives_the_papers_own_numbers():
    """App. G for the 9B MoE model: 1.18e8 over 5.06e9, 2.3%."""
    path = recipe.find("moe/nitp_9b_a1b", "recipes")
    backbone, added = paper_flops(load_config(path, recipe.find("h100x8", "train_configs")).model_spec.model)
    assert (round(backbone / 1e9, 2), round(added / 1e8, 2)) == (5.06, 1.18)


@pytest.mark.parametrize("case", ["dense", "moe", "worst"])
def test_memory_of_activations_grows_by_two_percent_at_most(stats, case):
    ntp, nitp = (stats[case][variant]["peak_bytes"] for variant in ("NTP", "NITP"))
    assert nitp <= (1 + MEMORY_BAR) * ntp


def test_activations_of_a_dense_model_are_what_its_layers_keep(stats):
    """A lower bound by hand, bfloat16: both norms' outputs, queries, keys, values, attention and what the FFN keeps."""
    d, kv, hidden = DENSE["dim"], DENSE["kv_dim"], DENSE["hidden"]
    layer = 2 * LENGTH * (2 * d + d + 2 * kv + d + 4 * hidden)
    logits = LENGTH // 8 * V * (2 + 4 + 4)
    peak = stats["dense"]["NTP"]["peak_bytes"]
    assert DENSE["layers"] * layer + logits < peak < 2 * (DENSE["layers"] * layer + logits)


def test_states_are_sharded(stats):
    projector = 12 * DENSE["dim"] ** 2
    ntp, nitp = (stats["dense"][variant]["state_bytes"] for variant in ("NTP", "NITP"))
    assert nitp - ntp == 16 * projector / 8


def test_with_fsdp_the_projector_is_gathered_once_and_its_gradient_reduced_once(stats):
    for model, sizes in (("dense", DENSE), ("moe", MOE)):
        projector = 12 * sizes["dim"] ** 2
        assert _added(stats[model]) == {
            ("all_gather", "world"): (1, 2 * projector),
            ("reduce_scatter", "world"): (1, 4 * projector),
        }


@pytest.mark.parametrize("case", CASES)
def test_fsdp_gathers_as_many_layers_ahead_as_without_nitp(stats, case):
    ntp, nitp = (stats[case][variant]["prefetched"] for variant in ("NTP", "NITP"))
    assert nitp >= ntp > 0


def test_replicas_sum_the_projectors_gradient_once_whatever_the_depth(stats):
    projector = 12 * 2560**2
    assert _added(stats["replicas"]) == {
        ("all_gather", "dp_shard"): (1, 2 * projector),
        ("reduce_scatter", "dp_shard"): (1, 4 * projector),
        ("all_reduce", "dp_replicate"): (1, 4 * projector // 8),
    }
    assert _added(stats["replicas"]) == _added(stats["deeper"])


def test_tensor_parallelism_gathers_the_implicit_tokens_and_sums_the_projections(stats):
    projector, states = 12 * 2560**2 // 4, 2048 * 2560
    assert _added(stats["tp"]) == {
        ("all_gather", "dp_shard"): (1, 2 * projector),
        ("reduce_scatter", "dp_shard"): (1, 4 * projector),
        ("all_gather", "tp"): (1, 2 * states),
        # The projector needs one chunk where the logits need eight.
        ("all_reduce", "tp"): (1, 2 * states),
    }


def test_context_parallelism_sends_the_first_token_of_every_run(stats):
    projector, runs = 12 * 2560**2, 8 * 2
    assert _added(stats["cp"]) == {
        ("all_gather", "world"): (1, 2 * projector),
        ("reduce_scatter", "world"): (1, 4 * projector),
        # States in bfloat16 and position ids.
        ("all_gather", "cp"): (2, runs * (2 * 2560 + 8)),
    }


def test_a_process_with_a_process_group_counts_nothing(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="needs a process without a torch.distributed process group"):
        next(count_all([Case("dense/nitp_0.5b", "NTP")]))


def test_the_norm_that_stands_for_a_gpus_kernel_is_torchs():
    torch.manual_seed(0)
    config = RMSNorm.Config(normalized_shape=64)
    norms = [config.build(), kernels.fused_rms_norm(config).build()]
    norms[0].weight.data = torch.randn(64)
    norms[1].load_state_dict(norms[0].state_dict())
    inputs = [torch.randn(2, 8, 64).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    for norm, x in zip(norms, inputs):
        (norm(x) ** 3).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(norms[1].weight.grad, norms[0].weight.grad)
