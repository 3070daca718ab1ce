"""Whether model, batch and parallel degrees fit together; asked before anything is built."""

import math
from types import SimpleNamespace

from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed.pipeline_parallel import _generate_llm_fqn_per_model_part, _get_pipeline_metadata
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from nitp_titan.config.schedules import V_SHAPED
from nitp_titan.errors import UserError

# FlexAttention's mask works on blocks of so many positions.
_MASK_BLOCK = 128


def check_parallelism(config, world_size: int) -> None:
    """Raise UserError, with the reason, unless a ``Trainer.Config`` fits its model and ``world_size`` ranks."""
    _check_ranks(config.parallelism, world_size)
    _check_batch(config, world_size)
    _check_sequence(config)
    _check_geometry(config)
    _check_attention_heads(config)
    _check_experts(config, world_size)
    _check_stages(config)
    _check_wrong_upstream(config)


def data_parallel_ranks(parallelism, world_size: int) -> int:
    """Ranks that read different data: all but tensor, context and pipeline parallelism."""
    return world_size // (
        parallelism.tensor_parallel_degree * parallelism.context_parallel_degree * parallelism.pipeline_parallel_degree
    )


def _refuse(table: str, key: str, message: str) -> None:
    raise UserError(f"[{table}] {key} = {message}", table=table, key=key)


def _check_ranks(parallelism, world_size: int) -> None:
    degrees = {
        "tensor": parallelism.tensor_parallel_degree,
        "context": parallelism.context_parallel_degree,
        "pipeline": parallelism.pipeline_parallel_degree,
        "replicate": parallelism.data_parallel_replicate_degree,
        "shard": max(1, parallelism.data_parallel_shard_degree),
    }
    product = math.prod(degrees.values())
    exact = parallelism.data_parallel_shard_degree != -1
    if world_size % product or (exact and world_size != product):
        shown = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
        raise UserError(
            f"[parallelism] needs {shown} = {product} ranks{'' if exact else ' or a multiple'}, "
            f"but there are {world_size}.",
            table="parallelism",
        )


def _check_batch(config, world_size: int) -> None:
    training = config.training
    data_ranks = data_parallel_ranks(config.parallelism, world_size)
    per_pass = training.local_batch_size * data_ranks
    if training.global_batch_size > 0 and training.global_batch_size % per_pass:
        share, rest = divmod(training.global_batch_size, data_ranks)
        allowed = ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
        way_out = "the ranks themselves do not divide it" if rest else f"choose one of {allowed}"
        _refuse(
            "training",
            "local_batch_size",
            f"{training.local_batch_size} times {data_ranks} data-parallel ranks does not divide global_batch_size = "
            f"{training.global_batch_size}; {way_out}.",
        )


def _check_sequence(config) -> None:
    parallelism, seq_len = config.parallelism, config.training.seq_len
    cp = parallelism.context_parallel_degree
    tp = parallelism.tensor_parallel_degree if parallelism.enable_sequence_parallel else 1
    # Head-tail balancing cuts the sequence into two chunks per context-parallel rank.
    pieces = tp * (2 * cp if cp > 1 else 1)
    if seq_len % pieces:
        _refuse("training", "seq_len", f"{seq_len} cannot be cut into {pieces} equal pieces (TP {tp}, CP {cp}).")
    if cp > 1 and seq_len % (cp * _MASK_BLOCK):
        block = f"{cp} x {_MASK_BLOCK}, the attention mask's block"
        _refuse("training", "seq_len", f"{seq_len} is not a multiple of CP {block}.")
    if isinstance(config.loss, ChunkedLossWrapper.Config) and seq_len % (config.loss.num_chunks * cp):
        _refuse("loss", "num_chunks", f"{config.loss.num_chunks} does not divide a rank's {seq_len} / {cp} positions.")


def _check_geometry(config) -> None:
    parallelism = config.parallelism
    ptrr = parallelism.context_parallel_load_balancer == "ptrr" and parallelism.context_parallel_degree > 1
    if config.geometry.enable and ptrr:
        _refuse(
            "parallelism",
            "context_parallel_load_balancer",
            "'ptrr' reorders tokens by their mask, so [geometry] cannot tell them apart; take 'headtail' or 'none'.",
        )


def _check_attention_heads(config) -> None:
    tp = config.parallelism.tensor_parallel_degree
    attention = config.model_spec.model.first_attention
    if tp == 1 or attention is None:
        return
    heads = {"n_heads": attention.n_heads, "n_kv_heads": getattr(attention, "n_kv_heads", None) or attention.n_heads}
    for name, count in heads.items():
        if count % tp:
            _refuse("parallelism", "tensor_parallel_degree", f"{tp} does not divide the model's {name} = {count}.")


def _check_experts(config, world_size: int) -> None:
    ep = config.parallelism.expert_parallel_degree
    if ep == 1:
        return
    moes = [layer.moe for layer in config.model_spec.model.layers if getattr(layer, "moe", None) is not None]
    if not moes:
        _refuse("parallelism", "expert_parallel_degree", f"{ep}, but {config.model_spec.flavor} has no experts.")
    if moes[0].num_experts % ep:
        _refuse(
            "parallelism", "expert_parallel_degree", f"{ep} does not divide the model's {moes[0].num_experts} experts."
        )
    parallelism = config.parallelism
    outside = parallelism.pipeline_parallel_degree * parallelism.data_parallel_replicate_degree
    ranks = world_size // outside
    if ranks % ep:
        _refuse(
            "parallelism",
            "expert_parallel_degree",
            f"{ep} does not divide the {ranks} ranks (shard x context x tensor) that experts are spread over.",
        )


def _check_stages(config) -> None:
    parallelism, model = config.parallelism, config.model_spec.model
    stages = parallelism.pipeline_parallel_degree
    if stages == 1:
        return
    size, microbatch = config.training.local_batch_size, parallelism.pipeline_parallel_microbatch_size
    if parallelism.pipeline_parallel_schedule == "1F1B" and size // microbatch < stages:
        _refuse(
            "training",
            "local_batch_size",
            f"{size} in microbatches of {microbatch} is too few for the {stages} stages of schedule 1F1B; choose "
            f"{stages * microbatch} or more.",
        )
    if config.validator.enable and parallelism.pipeline_parallel_schedule in V_SHAPED:
        _refuse(
            "validator",
            "enable",
            f"true, but torch 2.14 runs schedule {parallelism.pipeline_parallel_schedule} with a backward pass only; "
            "choose InterleavedZeroBubble, or enable = false.",
        )
    if model.enable_weight_tying:
        _refuse(
            "parallelism",
            "pipeline_parallel_degree",
            f"{stages}, but {config.model_spec.flavor} ties embedding and unembedding, and TorchTitan pipelines no "
            "tied weights.",
        )
    if stages > len(model.layers):
        _refuse(
            "parallelism", "pipeline_parallel_degree", f"{stages} is more than the model's {len(model.layers)} layers."
        )
    if parallelism.module_fqns_per_model_part is None:
        _check_split(parallelism, model)


def _check_split(parallelism, model) -> None:
    """Ask TorchTitan how it would cut the layers into stages."""
    try:
        ranks = SimpleNamespace(pp=parallelism.pipeline_parallel_degree)
        _generate_llm_fqn_per_model_part(*_get_pipeline_metadata(ranks, parallelism, model))
    except ValueError as error:
        reason = str(error)
        for name, end in (("input_weight", "first"), ("output_weight", "last")):
            reason = reason.replace(name, f"pipeline_parallel_{end}_stage_less_layers")
        raise UserError(f"[parallelism] {reason}", table="parallelism", key="pipeline_parallel_degree") from None


def _check_wrong_upstream(config) -> None:
    """Refuse what TorchTitan 0.3.0 gets wrong, without NITP too; tests/distributed/test_controls.py shows it."""
    parallelism = config.parallelism
    pp, cp, tp, ep = (
        getattr(parallelism, f"{axis}_parallel_degree") for axis in ("pipeline", "context", "tensor", "expert")
    )
    if parallelism.spmd_backend == "full_dtensor" and pp > 1 and cp > 1:
        _refuse(
            "parallelism",
            "spmd_backend",
            "'full_dtensor', with which TorchTitan 0.3.0 gets gradients wrong under pipeline and context parallelism "
            "together; choose 'spmd_types'.",
        )
    biased = any(config.model_spec.model.traverse(GptOssGroupedExperts.Config))
    if biased and tp > 1 and ep == 1:
        _refuse(
            "parallelism",
            "tensor_parallel_degree",
            f"{tp}, with which TorchTitan 0.3.0 gets the experts' biases of {config.model_spec.name} wrong unless the "
            "experts are spread; set expert_parallel_degree above 1.",
        )
