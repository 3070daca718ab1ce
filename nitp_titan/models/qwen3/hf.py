"""Qwen3 models outside of this project: ``Qwen3ForCausalLM`` and ``Qwen3MoeForCausalLM``."""

from typing import Any

from torchtitan.models.qwen3 import Qwen3Model

from nitp_titan.models.hf_common import (
    dense_hidden_dim,
    experts,
    gqa_config,
    leading_dense_layers,
    PURE_ROTATION,
    require_exact,
    shared_hidden_dim,
)


def hf_config(model: Qwen3Model.Config) -> dict[str, Any]:
    """``config.json`` of a model; UserError, with the reason, if the class computes something else."""
    has_experts = any(layer.moe is not None for layer in model.layers)
    architecture = "Qwen3MoeForCausalLM" if has_experts else "Qwen3ForCausalLM"
    config = {
        "architectures": [architecture],
        "model_type": "qwen3_moe" if has_experts else "qwen3",
        **gqa_config(model, architecture, scaling=PURE_ROTATION),
        "attention_bias": False,
    }
    attention = model.layers[0].attention
    require_exact(attention.qk_norm is not None, architecture, "it does not normalise queries and keys")
    require_exact(attention.qk_norm.eps == config["rms_norm_eps"], architecture, "its norms differ in their epsilon")
    if not has_experts:
        return config | {"intermediate_size": dense_hidden_dim(model, architecture)}
    return config | _experts_config(model, architecture)


def _experts_config(model: Qwen3Model.Config, architecture: str) -> dict[str, Any]:
    moe, dense = experts(model, architecture), leading_dense_layers(model, architecture)
    router, width = moe.router, moe.routed_experts.inner_experts.hidden_dim
    for holds, reason in (
        (router.score_func == "softmax", f"it routes with a {router.score_func}"),
        (router.route_scale == 1, f"the weights of a token's experts are scaled by {router.route_scale}"),
        (not router.num_expert_groups, "its routing is limited to groups of experts"),
        (shared_hidden_dim(moe) == 0, "it has shared experts"),
    ):
        require_exact(holds, architecture, reason)
    return {
        "intermediate_size": dense_hidden_dim(model, architecture) if dense else width,
        "moe_intermediate_size": width,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.route_norm,
        "mlp_only_layers": list(range(dense)),
        "decoder_sparse_step": 1,
    }
