"""TorchTitan's GPT-OSS (sliding windows, attention sinks, experts with biases), with a debug flavor for a CPU."""

import dataclasses

from torchtitan.models import gpt_oss
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.gpt_oss import _build_gptoss_layers, GptOssModel
from torchtitan.protocols.model_spec import ModelSpec

_DIM, _VOCABULARY = 96, 4096


def _debug(moe_comm_backend: str, attn_backend: str) -> GptOssModel.Config:
    layers = _build_gptoss_layers(
        dim=_DIM,
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
        layer.attention = gpt_oss._make_gptoss_attn_config(
            dim=_DIM,
            layer_id=layer_id,
            attn_backend=attn_backend,
            n_heads=4,
            n_kv_heads=2,
            head_dim=24,
            sliding_window_size=layer.attention.sliding_window_size,
            rope=layer.attention.rope,
        )
    head, embedding = gpt_oss._output_linear_init(_DIM), gpt_oss._EMBEDDING_INIT
    return GptOssModel.Config(
        dim=_DIM,
        vocab_size=_VOCABULARY,
        tok_embeddings=Embedding.Config(num_embeddings=_VOCABULARY, embedding_dim=_DIM, param_init=embedding),
        norm=RMSNorm.Config(normalized_shape=_DIM, param_init=gpt_oss._NORM_INIT),
        lm_head=Linear.Config(in_features=_DIM, out_features=_VOCABULARY, param_init=head),
        layers=layers,
    )


FLAVORS = {**gpt_oss.gptoss_configs, "debug": _debug}


def model_registry(flavor: str, attn_backend: str = "flex", moe_comm_backend: str = "standard") -> ModelSpec:
    """TorchTitan's ``ModelSpec``; upstream's default attention backend is ``varlen``, which CPUs lack."""
    model = FLAVORS[flavor](attn_backend=attn_backend, moe_comm_backend=moe_comm_backend)
    return dataclasses.replace(gpt_oss.model_registry("debugmodel"), flavor=flavor, model=model)
