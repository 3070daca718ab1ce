"""DeepSeek-V3 models outside of this project: ``DeepseekV3ForCausalLM``."""

from typing import Any

from torchtitan.models.deepseek_v3 import DeepSeekV3Model

from nitp_titan.models.hf_common import (
    common_value,
    decoder_config,
    dense_hidden_dim,
    experts,
    leading_dense_layers,
    require_exact,
    rope_config,
    shared_hidden_dim,
)

_ARCHITECTURE = "DeepseekV3ForCausalLM"
# Of the norms of the latent states; the class takes no other.
LATENT_EPS = 1e-6


def hf_config(model: DeepSeekV3Model.Config) -> dict[str, Any]:
    """``config.json`` of a model; UserError, with the reason, if the class computes something else."""
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "deepseek_v3",
        **decoder_config(model, _ARCHITECTURE),
        **_attention_config(model),
        **_experts_config(model),
        "num_nextn_predict_layers": 0,
    }


def _attention_config(model: DeepSeekV3Model.Config) -> dict[str, Any]:
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mscale", "rope")
    values = {
        name: common_value(model.layers, lambda layer, name=name: getattr(layer.attention, name), _ARCHITECTURE, name)
        for name in names
    }
    for layer in model.layers:
        norms = [layer.attention.kv_norm] + ([layer.attention.q_norm] if values["q_lora_rank"] else [])
        require_exact(
            all(norm.eps == LATENT_EPS for norm in norms),
            _ARCHITECTURE,
            f"the epsilon of its latent norms is {norms[0].eps:g}, there it is always {LATENT_EPS:g}",
        )
    mscale, rope = values.pop("mscale"), values.pop("rope")
    return {
        **values,
        "q_lora_rank": values["q_lora_rank"] or None,
        "num_key_value_heads": model.layers[0].attention.n_heads,
        "attention_bias": False,
        "rope_interleave": True,
        **rope_config(rope, scaling={"mscale": mscale, "mscale_all_dim": mscale}),
    }


def _experts_config(model: DeepSeekV3Model.Config) -> dict[str, Any]:
    moe, dense = experts(model, _ARCHITECTURE), leading_dense_layers(model, _ARCHITECTURE)
    router, width = moe.router, moe.routed_experts.inner_experts.hidden_dim
    require_exact(router.score_func == "sigmoid", _ARCHITECTURE, f"it routes with a {router.score_func}")
    shared = shared_hidden_dim(moe)
    multiple = shared > 0 and shared % width == 0
    require_exact(multiple, _ARCHITECTURE, "its shared expert is not a multiple of a routed one")
    return {
        "intermediate_size": dense_hidden_dim(model, _ARCHITECTURE) if dense else width,
        "moe_intermediate_size": width,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": shared // width,
        "num_experts_per_tok": router.top_k,
        "n_group": router.num_expert_groups or 1,
        "topk_group": router.num_limited_groups or 1,
        "norm_topk_prob": router.route_norm,
        "routed_scaling_factor": router.route_scale,
        "first_k_dense_replace": dense,
    }
