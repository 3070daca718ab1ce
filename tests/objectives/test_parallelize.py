"""How layers are split over pipeline stages, and what the projector's FSDP unit is given."""

import types

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig

from nitp_titan.config import recipe
from nitp_titan.config.trained import trained
from nitp_titan.objectives import parallelize
from nitp_titan.objectives.parallelize import projector_cost, projector_layers, with_nitp_pipelining
from nitp_titan.training.trainer import load_config


@pytest.mark.parametrize(
    "cost, stages, layers, weights, expected",
    [
        (0, 4, 24, (1, 1), 0),
        (1, 4, 24, (1, 1), 1),
        (3, 4, 24, (1, 1), 3),
        # Six layers' worth on four stages leaves one for the last, which lm_head fills.
        (1, 4, 4, (1, 1), 0),
        (1, 2, 4, (1, 1), 1),
        # Then the last stage of two holds no layer at all.
        (9, 2, 4, (1, 2), 3),
    ],
)
def test_the_projector_takes_the_room_of_its_cost_as_far_as_stages_have_it(cost, stages, layers, weights, expected):
    extra = projector_layers(cost, stages, layers, *weights)
    assert extra == expected
    # TorchTitan's own condition, and a split that it makes.
    assert weights[1] + extra <= (layers + sum(weights) + extra) // stages or extra == 0


def _split(name: str, stages: int, **parallelism) -> tuple[list[list[str]], float]:
    """Modules per stage of a recipe's model, and the projector's cost in layers."""
    config = load_config(recipe.find(name, "recipes"), recipe.find("gpu", "train_configs"))
    spec = trained(config).model_spec
    with torch.device("meta"):
        model = spec.model.build()
    split = []

    def pipelining(model, *, parallelism, **kwargs):
        split.extend(parallelism.module_fqns_per_model_part)

    with_nitp_pipelining(pipelining)(
        model,
        parallel_dims=types.SimpleNamespace(pp=stages),
        parallelism=ParallelismConfig(pipeline_parallel_degree=stages, **parallelism),
        model_config=spec.model,
    )
    return split, projector_cost(model)


@pytest.mark.parametrize("name", ["moe/nitp_9b_a1b", "moe/nitp_45b_a5.5b", "dense/nitp_3b"])
def test_with_the_projector_the_last_stage_has_fewer_layers_and_the_costliest_stage_costs_no_more(name):
    split, projector = _split(name, 4)
    assert split[-1][-3:] == ["norm", "lm_head", "nitp"]
    layers = [sum(module.startswith("layers.") for module in stage) for stage in split]
    num_layers = sum(layers)
    assert [module for stage in split for module in stage if module.startswith("layers.")] == [
        f"layers.{index}" for index in range(num_layers)
    ]

    from torchtitan.distributed.pipeline_parallel import _generate_llm_fqn_per_model_part

    plain = _generate_llm_fqn_per_model_part(4, num_layers)
    without = [sum(module.startswith("layers.") for module in stage) for stage in plain]
    # TorchTitan counts embedding and output as a layer each.
    costs, uncounted = ([counts[0] + 1, *counts[1:-1], counts[-1] + 1 + projector] for counts in (layers, without))
    assert layers[-1] == without[-1] - 1
    assert max(costs) <= max(uncounted)
    assert max(costs) - min(costs) <= 1.5


def test_stages_that_a_train_config_lists_are_taken_as_they_are():
    stages = [["tok_embeddings", "layers.0"], ["layers.1", "norm", "lm_head"]]
    split, _ = _split("moe/nitp_9b_a1b", 2, module_fqns_per_model_part=stages)
    assert split == [["tok_embeddings", "layers.0"], ["layers.1", "norm", "lm_head", "nitp"]]
    assert stages[-1][-1] == "lm_head"


@pytest.mark.parametrize("offload", [False, True])
def test_the_projector_is_an_fsdp_unit_with_the_precision_and_the_offloading_of_the_training_config(
    monkeypatch, offload
):
    given = {}
    monkeypatch.setattr(parallelize, "fully_shard", lambda module, **options: given.update(options, module=module))
    monkeypatch.setattr(parallelize, "resolve_fsdp_mesh", lambda parallel_dims: ("mesh", None))
    monkeypatch.setattr(parallelize, "disable_fsdp_gradient_division", lambda module: given.update(summed=module))
    nitp = torch.nn.Module()
    nitp.projector = torch.nn.Linear(2, 2)
    nitp.parallelize = lambda parallel_dims: given.update(parallel_dims=parallel_dims)
    parallelize._parallelize_projector(
        nitp,
        types.SimpleNamespace(pp_enabled=True),
        TrainingConfig(enable_cpu_offload=offload, mixed_precision_param="bfloat16", mixed_precision_reduce="float32"),
        CompileConfig(enable=False),
    )
    assert given["module"] is nitp.projector and given["summed"] is nitp and given["mesh"] == "mesh"
    assert given["mp_policy"].param_dtype == torch.bfloat16 and given["mp_policy"].reduce_dtype == torch.float32
    assert isinstance(given.get("offload_policy"), CPUOffloadPolicy) is offload
