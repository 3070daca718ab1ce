"""TorchTitan's DeepSeek-V3 (latent attention, mixture of experts), with a debug flavor for a CPU."""

import dataclasses

from torchtitan.models import deepseek_v3
from torchtitan.models.common import ComplexRoPE
from torchtitan.models.deepseek_v3 import _build_dsv3_layers, DeepSeekV3Model
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.models.debug import debug_decoder, DIM
from nitp_titan.models.deepseek_v3.hf import hf_config, LATENT_EPS

__all__ = ["FLAVORS", "hf_config", "model_registry"]


def _debug(attn_backend: str, moe_comm_backend: str) -> DeepSeekV3Model.Config:
    """One dense layer, then group-limited sigmoid routing, as in the 671B model."""
    rope_dim = 12
    layers = _build_dsv3_layers(
        n_layers=4,
        n_dense_layers=1,
        dim=DIM,
        n_heads=4,
        q_lora_rank=48,
        kv_lora_rank=48,
        qk_nope_head_dim=24,
        qk_rope_head_dim=rope_dim,
        v_head_dim=24,
        mscale=1.0,
        dense_hidden_dim=256,
        moe_hidden_dim=48,
        num_experts=16,
        num_shared_experts=1,
        router_top_k=4,
        router_score_func="sigmoid",
        router_num_expert_groups=4,
        router_num_limited_groups=2,
        router_route_norm=True,
        attn_backend=attn_backend,
        moe_comm_backend=moe_comm_backend,
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=rope_dim, max_seq_len=4096, theta=10000.0),
    )
    for layer in layers:
        # As in the released model; TorchTitan's flavors take 1e-5, which transformers cannot express.
        for norm in (layer.attention.q_norm, layer.attention.kv_norm):
            norm.eps = LATENT_EPS
    return debug_decoder(deepseek_v3.deepseekv3_configs["debugmodel"](attn_backend, moe_comm_backend), layers)


FLAVORS = {**deepseek_v3.deepseekv3_configs, "debug": _debug}


def model_registry(flavor: str, attn_backend: str = "flex", moe_comm_backend: str = "standard") -> ModelSpec:
    """TorchTitan's ``ModelSpec``, without multi-token prediction layers."""
    model = FLAVORS[flavor](attn_backend=attn_backend, moe_comm_backend=moe_comm_backend)
    return dataclasses.replace(deepseek_v3.model_registry("debugmodel"), flavor=flavor, model=model)
