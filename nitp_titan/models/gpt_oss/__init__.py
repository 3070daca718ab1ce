"""TorchTitan's GPT-OSS (sliding windows, attention sinks, experts with biases), with a debug flavor for a CPU."""

import dataclasses

from torchtitan.models import gpt_oss
from torchtitan.models.common import CosSinRoPE
from torchtitan.models.gpt_oss import _build_gptoss_layers, _make_gptoss_attn_config, GptOssModel
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.models.debug import debug_decoder, DIM
from nitp_titan.models.gpt_oss.hf import hf_config
from nitp_titan.models.gpt_oss.state_dict_adapter import UnquantizedGptOssStateDictAdapter

__all__ = ["FLAVORS", "hf_config", "model_registry"]


def _debug(moe_comm_backend: str, attn_backend: str) -> GptOssModel.Config:
    layers = _build_gptoss_layers(
        dim=DIM,
        n_layers=4,
        hidden_dim=48,
        num_experts=16,
        top_k=4,
        load_balance_coeff=1e-3,
        attn_backend=attn_backend,
        moe_comm_backend=moe_comm_backend,
        rope=CosSinRoPE.Config(dim=24, max_seq_len=4096, theta=150000.0),
    )
    for layer_id, layer in enumerate(layers):
        # The builder's heads are those of the 20B and 120B models: 64 of 64 dimensions.
        layer.attention = _make_gptoss_attn_config(
            dim=DIM,
            layer_id=layer_id,
            attn_backend=attn_backend,
            n_heads=4,
            n_kv_heads=2,
            head_dim=24,
            sliding_window_size=layer.attention.sliding_window_size,
            rope=layer.attention.rope,
        )
    return debug_decoder(gpt_oss.gptoss_configs["debugmodel"](moe_comm_backend, attn_backend), layers)


FLAVORS = {**gpt_oss.gptoss_configs, "debug": _debug}


def model_registry(flavor: str, attn_backend: str = "flex", moe_comm_backend: str = "standard") -> ModelSpec:
    """TorchTitan's ``ModelSpec``; upstream's default attention backend is ``varlen``, which CPUs lack."""
    model = FLAVORS[flavor](attn_backend=attn_backend, moe_comm_backend=moe_comm_backend)
    spec = gpt_oss.model_registry("debugmodel")
    return dataclasses.replace(spec, flavor=flavor, model=model, state_dict_adapter=UnquantizedGptOssStateDictAdapter)
