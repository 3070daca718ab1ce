"""GPT-OSS models outside of this project: ``GptOssForCausalLM``."""

from typing import Any

from torchtitan.models.gpt_oss import GptOssModel

from nitp_titan.models.hf_common import (
    common_value,
    experts,
    gqa_config,
    require_exact,
    shared_hidden_dim,
)

_ARCHITECTURE = "GptOssForCausalLM"


def hf_config(model: GptOssModel.Config) -> dict[str, Any]:
    """``config.json`` of a model; UserError, with the reason, if the class computes something else."""
    moe = experts(model, _ARCHITECTURE)
    router = moe.router
    windows = [layer.attention.sliding_window_size for layer in model.layers]
    sliding = [window for window in windows if window is not None]
    for holds, reason in (
        (all(layer.moe is not None for layer in model.layers), "it has dense layers"),
        (shared_hidden_dim(moe) == 0, "it has shared experts"),
        (router.score_func == "softmax" and router.route_norm, "it does not take the softmax over a token's experts"),
        (router.route_scale == 1, f"the weights of a token's experts are scaled by {router.route_scale}"),
        (not router.num_expert_groups, "its routing is limited to groups of experts"),
    ):
        require_exact(holds, _ARCHITECTURE, reason)
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "gpt_oss",
        # Both scale attention as YaRN does by default.
        **gqa_config(model, _ARCHITECTURE, scaling={}),
        "intermediate_size": moe.routed_experts.inner_experts.hidden_dim,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": router.top_k,
        "swiglu_limit": moe.routed_experts.inner_experts.swiglu_limit,
        "sliding_window": common_value(sliding, lambda window: window, _ARCHITECTURE, "their windows")
        if sliding
        else None,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "attention_bias": True,
    }
