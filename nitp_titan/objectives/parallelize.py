"""The objective's module under FSDP, tensor and pipeline parallelism: wrappers of a family's own functions."""

import dataclasses
from collections.abc import Callable

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, MixedPrecisionPolicy
from torchtitan.config import CompileConfig, ParallelismConfig, TORCH_DTYPE_MAP, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
from torchtitan.distributed.full_dtensor import resolve_fsdp_mesh
from torchtitan.distributed.pipeline_parallel import _generate_llm_fqn_per_model_part, _get_pipeline_metadata
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import GroupedExperts, MoE

from nitp_titan.objectives.decoder import NITPDecoder
from nitp_titan.objectives.nitp import NITPModule


def with_nitp_parallelize(parallelize_fn: Callable) -> Callable:
    """Wrap a family's parallelize function: the projector becomes an FSDP unit of its own.

    The projector runs in the loss, after the root module's forward, so it must not belong
    to the root's FSDP unit; the family's function therefore never sees it.
    """

    def parallelize(model: NITPDecoder, **kwargs) -> NITPDecoder:
        nitp, model.nitp = model.nitp, None
        model = parallelize_fn(model, **kwargs)
        if nitp is not None:
            _parallelize_projector(nitp, kwargs["parallel_dims"], kwargs["training"], kwargs["compile_config"])
        model.nitp = nitp
        return model

    return parallelize


def _parallelize_projector(
    nitp: NITPModule,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    compile_config: CompileConfig,
) -> None:
    nitp.parallelize(parallel_dims)
    if next(nitp.parameters(), None) is None:
        return
    if compile_config.enable and "model" in compile_config.components:
        nitp.projector.compile(backend=compile_config.backend, fullgraph=True)
    mesh, mesh_dims = resolve_fsdp_mesh(parallel_dims)
    options = {} if mesh_dims is None else {"dp_mesh_dims": mesh_dims}
    if training.enable_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    fully_shard(
        nitp.projector,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            cast_forward_inputs=False,
        ),
        **options,
    )
    # The loss divides by global counts, so gradients are summed over ranks, not averaged.
    disable_fsdp_gradient_division(nitp)


def with_nitp_pipelining(pipelining_fn: Callable) -> Callable:
    """Wrap a family's pipelining function: the last stage holds the NITP module.

    Pipelining drops every module that no stage lists. Where TorchTitan splits the layers, the
    projector counts as the layers that cost as much, on top of `[parallelism]
    pipeline_parallel_last_stage_less_layers`.
    """

    def pipeline(
        model: nn.Module, *, parallel_dims: ParallelDims, parallelism: ParallelismConfig, model_config, **kwargs
    ):
        stages = parallelism.module_fqns_per_model_part
        if stages is None:
            num_stages, num_layers, input_weight, output_weight = _get_pipeline_metadata(
                parallel_dims, parallelism, model_config
            )
            projector = projector_layers(
                round(projector_cost(model)), num_stages, num_layers, input_weight, output_weight
            )
            stages = _generate_llm_fqn_per_model_part(num_stages, num_layers, input_weight, output_weight + projector)
        stages = [list(stage) for stage in stages]
        if "nitp" not in stages[-1]:
            stages[-1].append("nitp")
        parallelism = dataclasses.replace(parallelism, module_fqns_per_model_part=stages)
        return pipelining_fn(
            model, parallel_dims=parallel_dims, parallelism=parallelism, model_config=model_config, **kwargs
        )

    return pipeline


def projector_layers(cost: int, num_stages: int, num_layers: int, input_weight: int, output_weight: int) -> int:
    """Layers that the last stage holds less for the projector's sake: its cost, or what the stages have room for.

    TorchTitan refuses a split whose output modules weigh more than a stage.
    """
    layers = num_layers + input_weight + output_weight
    return max(
        extra for extra in range(cost + 1) if extra == 0 or output_weight + extra <= (layers + extra) // num_stages
    )


def projector_cost(model: Decoder) -> float:
    """FLOPs of the projector as a multiple of those of a decoder layer, the mean over layers.

    Args:
        model: a whole built model with the NITP module, not parallelized.
    """
    layers = model.layers.values()
    return matmul_parameters(model.nitp) * len(layers) / sum(matmul_parameters(layer) for layer in layers)


def matmul_parameters(module: nn.Module) -> float:
    """Parameters that multiply the states of one token."""
    linears = sum(linear.weight.numel() for linear in modules_of_type(module, nn.Linear))
    return linears + sum(expert_parameters(moe) * share_used(moe) for moe in modules_of_type(module, MoE))


def modules_of_type(model: nn.Module, kind: type) -> list:
    """Modules of a type in a model, itself included."""
    return [module for module in model.modules() if isinstance(module, kind)]


def expert_parameters(moe: MoE) -> int:
    """Parameters of all routed experts of a layer."""
    return sum(p.numel() for experts in modules_of_type(moe, GroupedExperts) for p in experts.parameters())


def share_used(moe: MoE) -> float:
    """Share of the routed experts that one token uses."""
    return moe.router.top_k / moe.router.num_experts
