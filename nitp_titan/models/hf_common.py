"""Parts of ``config.json`` that the families of `nitp_titan.models` have in common.

A family's ``hf_config`` takes TorchTitan's model config and returns the settings of the transformers class that
computes the same; what that class cannot express is refused with the reason.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torchtitan.models.common.attention import GQAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.rope import RoPE

from nitp_titan.errors import UserError

# YaRN's frequencies without its scaling of attention, which TorchTitan's grouped-query attention does not have.
PURE_ROTATION = {"attention_factor": 1.0}


def require_exact(holds: bool, architecture: str, reason: str) -> None:
    """Raise UserError, with the reason, unless a transformers class can express a property of the model."""
    if not holds:
        raise UserError(f"this model has no exact home in {architecture}: {reason}.")


def common_value(layers: Sequence[Any], of: Callable[[Any], Any], architecture: str, what: str) -> Any:
    """The value that all layers have; UserError if they differ, for a ``config.json`` holds one."""
    first, *others = [of(layer) for layer in layers]
    require_exact(all(other == first for other in others), architecture, f"its layers differ in {what}")
    return first


def decoder_config(model: Decoder.Config, architecture: str) -> dict[str, Any]:
    """Settings of every decoder: sizes, tied embeddings, epsilon of the norms."""
    norms = [model.norm] + [norm for layer in model.layers for norm in (layer.attention_norm, layer.ffn_norm)]
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": common_value(model.layers, lambda layer: layer.attention.n_heads, architecture, "heads"),
        "rms_norm_eps": common_value(norms, lambda norm: norm.eps, architecture, "the epsilon of their norms"),
        "hidden_act": "silu",
        "tie_word_embeddings": model.enable_weight_tying,
    }


def gqa_config(model: Decoder.Config, architecture: str, *, scaling: dict[str, Any]) -> dict[str, Any]:
    """`decoder_config`, key-value heads and rotary embeddings of grouped-query attention.

    Args:
        scaling: as in `rope_config`.
    """
    attention: GQAttention.Config = model.layers[0].attention
    for what in ("n_kv_heads", "head_dim"):
        common_value(model.layers, lambda layer, what=what: getattr(layer.attention, what), architecture, what)
    rope = common_value(model.layers, lambda layer: layer.attention.rope, architecture, "rotary embeddings")
    return {
        **decoder_config(model, architecture),
        "num_key_value_heads": attention.n_kv_heads or attention.n_heads,
        "head_dim": attention.head_dim or attention.dim // attention.n_heads,
        **rope_config(rope, scaling),
    }


def rope_config(rope: RoPE.Config, scaling: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings, under the names of transformers 5 and of versions before it.

    Args:
        scaling: parameters of YaRN beyond those of the frequencies: how attention is scaled differs by family.
    """
    parameters: dict[str, Any] = {"rope_type": "default"}
    if rope.scaling == "llama":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        parameters = {"rope_type": "llama3", "factor": rope.scaling_factor} | {n: getattr(rope, n) for n in names}
    elif rope.scaling == "yarn" and rope.rope_factor > 1:
        frequencies = {name: getattr(rope, name) for name in ("beta_fast", "beta_slow", "truncate")}
        frequencies |= {"factor": float(rope.rope_factor), "original_max_position_embeddings": rope.original_seq_len}
        parameters = {"rope_type": "yarn", **frequencies, **scaling}
    older = {} if parameters["rope_type"] == "default" else {"rope_scaling": parameters}
    return {"rope_theta": rope.theta, "rope_parameters": {**parameters, "rope_theta": rope.theta}, **older}


def leading_dense_layers(model: Decoder.Config, architecture: str) -> int:
    """Number of dense layers before the layers with experts; UserError if they alternate."""
    has_experts = [layer.moe is not None for layer in model.layers]
    dense = has_experts.index(True) if any(has_experts) else len(has_experts)
    require_exact(all(has_experts[dense:]), architecture, "dense layers follow layers with experts")
    return dense


def experts(model: Decoder.Config, architecture: str) -> MoE.Config:
    """The mixture of experts that all layers with experts agree in."""
    layers = [layer for layer in model.layers if layer.moe is not None]
    for what, of in {
        "number of experts": lambda layer: layer.moe.num_experts,
        "width of the experts": lambda layer: layer.moe.routed_experts.inner_experts.hidden_dim,
        "width of the shared experts": lambda layer: shared_hidden_dim(layer.moe),
        "top-k": lambda layer: layer.moe.router.top_k,
        "routing": lambda layer: _routing(layer.moe.router),
    }.items():
        common_value(layers, of, architecture, what)
    return layers[0].moe


def _routing(router) -> tuple:
    names = ("num_expert_groups", "num_limited_groups", "score_func", "route_norm", "route_scale")
    return tuple(getattr(router, name) for name in names)


def shared_hidden_dim(moe: MoE.Config) -> int:
    """Width of all shared experts together; 0 without one."""
    return moe.shared_experts.w1.out_features if moe.shared_experts is not None else 0


def dense_hidden_dim(model: Decoder.Config, architecture: str) -> int:
    """Width of the feed-forward of all dense layers."""
    dense = [layer for layer in model.layers if layer.feed_forward is not None]
    return common_value(
        dense, lambda layer: layer.feed_forward.w1.out_features, architecture, "the feed-forward's width"
    )
