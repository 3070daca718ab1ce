"""The paper's MoE models outside of this project: ``Ernie4_5_MoeForCausalLM``.

It is the class of transformers with softmax routing, normalised top-k weights, a selection bias, leading dense layers,
a shared expert and grouped-query attention. Its rotary embeddings are interleaved like TorchTitan's.
"""

from typing import Any

from torchtitan.models.qwen3 import Qwen3Model

from nitp_titan.models.hf_common import (
    dense_hidden_dim,
    experts,
    gqa_config,
    leading_dense_layers,
    require_exact,
    shared_hidden_dim,
)

_ARCHITECTURE = "Ernie4_5_MoeForCausalLM"


def hf_config(model: Qwen3Model.Config) -> dict[str, Any]:
    """``config.json`` of a model; UserError, with the reason, if the class computes something else."""
    config = gqa_config(model, _ARCHITECTURE, scaling={})
    dense = leading_dense_layers(model, _ARCHITECTURE)
    moe = experts(model, _ARCHITECTURE)
    router, width = moe.router, moe.routed_experts.inner_experts.hidden_dim
    for holds, reason in (
        (config["rope_parameters"]["rope_type"] == "default", "its rotary embeddings are scaled"),
        (config.pop("head_dim") * model.layers[0].attention.n_heads == model.dim, "its heads do not make up its width"),
        (model.layers[0].attention.qk_norm is None, "it normalises queries and keys"),
        (router.score_func == "softmax", f"it routes with a {router.score_func}"),
        (router.route_norm, "the weights of a token's experts are not normalised (route_norm = False)"),
        (router.route_scale == 1, f"the weights of a token's experts are scaled by {router.route_scale}"),
        (not router.num_expert_groups, "its routing is limited to groups of experts"),
        (shared_hidden_dim(moe) % width == 0, "its shared expert is not a multiple of a routed one"),
    ):
        require_exact(holds, _ARCHITECTURE, reason)
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "ernie4_5_moe",
        **config,
        "intermediate_size": dense_hidden_dim(model, _ARCHITECTURE) if dense else width,
        "use_bias": False,
        "moe_intermediate_size": width,
        "moe_k": router.top_k,
        "moe_num_experts": moe.num_experts,
        "moe_num_shared_experts": shared_hidden_dim(moe) // width,
        "moe_layer_start_index": dense,
        "moe_layer_end_index": len(model.layers) - 1,
        "moe_layer_interval": 1,
    }
