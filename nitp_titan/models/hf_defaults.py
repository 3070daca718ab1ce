"""Settings that a ``config.json`` leaves out: the defaults of the transformers class that it names.

Only those that the shapes of the tensors do not show. Source: the configuration classes of transformers 5.24; a test
compares them with the installed ones. Training does not need transformers.
"""

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED = {"hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_parameters": _ROPE}

CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_SHARED, "num_attention_heads": 32, "attention_bias": False, "mlp_bias": False},
    "qwen3": {
        **_SHARED,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
    },
    "qwen3_moe": {
        **_SHARED,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "deepseek_v3": {
        **_SHARED,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": False,
        "rope_interleave": True,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
    },
    "gpt_oss": {
        **_SHARED,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "sliding_window": 128,
    },
    "ernie4_5_moe": {
        **_SHARED,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "use_bias": False,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
    },
}


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """A ``config.json`` with its class's defaults where it is silent.

    Args:
        settings: of the file; those of a class that is not in the table are returned as they are.
    """
    defaults = dict(CLASS_DEFAULTS.get(settings.get("model_type"), {}))
    rope = defaults.pop("rope_parameters", {})
    filled = {**defaults, **settings}
    # Older files have the base beside the scaling; without any scaling the class has its own.
    own = settings.get("rope_parameters") or settings.get("rope_scaling")
    parameters = dict(own or rope)
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    base = (own or {}).get("rope_theta", settings.get("rope_theta"))
    return {**filled, "rope_parameters": {**parameters, "rope_theta": rope.get("rope_theta") if base is None else base}}
