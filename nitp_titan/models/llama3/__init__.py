"""Llama-style dense decoders (RMSNorm, SwiGLU, RoPE, no biases), from TorchTitan's own blocks."""

from functools import partial

import torch.nn as nn
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import get_attention_config, make_ffn_config, make_gqa_config
from torchtitan.models.common.param_init import depth_scaled_std, skip_param_init
from torchtitan.models.llama3 import llama3_configs, Llama3Model, parallelize_llama
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.models.llama3.hf import hf_config

__all__ = ["FLAVORS", "hf_config", "llama", "model_registry"]


def _normal(std: float) -> dict:
    return {"weight": partial(nn.init.trunc_normal_, std=std)}


def _layer(
    layer_id: int, *, dim: int, n_heads: int, n_kv_heads: int, hidden_dim: int, rope_theta: float, attn_backend: str
) -> Llama3TransformerBlock.Config:
    norm = {"weight": nn.init.ones_}
    depth_scaled = _normal(depth_scaled_std(0.02, layer_id))
    return Llama3TransformerBlock.Config(
        attention_norm=RMSNorm.Config(normalized_shape=dim, param_init=norm),
        ffn_norm=RMSNorm.Config(normalized_shape=dim, param_init=norm),
        attention=make_gqa_config(
            dim=dim,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            wqkv_param_init=_normal(0.02),
            wo_param_init=depth_scaled,
            inner_attention=get_attention_config(attn_backend),
            fuse_qkv=True,
            rope=ComplexRoPE.Config(dim=dim // n_heads, max_seq_len=131072, theta=rope_theta),
        ),
        feed_forward=make_ffn_config(
            dim=dim, hidden_dim=hidden_dim, w1_param_init=_normal(0.02), w2w3_param_init=depth_scaled
        ),
    )


def llama(
    *,
    attn_backend: str,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    hidden_dim: int,
    vocab_size: int,
    tied: bool,
    rope_theta: float = 500000,
) -> Llama3Model.Config:
    """Config of a Llama model; initialisation as in TorchTitan's llama3, where the paper is silent.

    Args:
        dim: model dimension; the head dimension is ``dim / n_heads``.
        hidden_dim: width of the SwiGLU feed-forward.
        tied: one weight for token embedding and unembedding.
    """
    std = dim**-0.5
    head_init = {"weight": partial(nn.init.trunc_normal_, std=std, a=-3 * std, b=3 * std)}
    embedding_init = {"weight": skip_param_init if tied else partial(nn.init.normal_, std=1.0)}
    layer = partial(
        _layer,
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        hidden_dim=hidden_dim,
        rope_theta=rope_theta,
        attn_backend=attn_backend,
    )
    return Llama3Model.Config(
        dim=dim,
        vocab_size=vocab_size,
        enable_weight_tying=tied,
        tok_embeddings=Embedding.Config(num_embeddings=vocab_size, embedding_dim=dim, param_init=embedding_init),
        norm=RMSNorm.Config(normalized_shape=dim, param_init={"weight": nn.init.ones_}),
        lm_head=Linear.Config(in_features=dim, out_features=vocab_size, param_init=head_init),
        layers=[layer(layer_id) for layer_id in range(n_layers)],
    )


_QWEN2_VOCABULARY = 152064
_DEBUG = dict(dim=96, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=256, vocab_size=4096)
# The paper's dense models (Table 4); its sizes come out with tied embeddings only.
_PAPER = dict(vocab_size=_QWEN2_VOCABULARY, tied=True)
# A vocabulary of 32,000: with Qwen2's a model of 50M parameters would be nothing but its embedding.
_LADDER = dict(vocab_size=32000, tied=True)
_LLAMA_2 = dict(vocab_size=32000, tied=False)

_SHAPES = {
    # Small enough for two CPU cores, shaped like the paper's dense models: GQA, tied embeddings.
    "debug": dict(**_DEBUG, tied=True),
    # TorchTitan does not pipeline tied embeddings.
    "debug_untied": dict(**_DEBUG, tied=False),
    # The mechanism study's larger vocabulary.
    "debug_16k": dict(**{**_DEBUG, "vocab_size": 16384}, tied=True),
    # The paper's 9b-A1b at CPU size: as many layers, and the active parameters of a layer (16.5 d^2) and of the
    # vocabulary (119 d) in the same proportion to the projector's.
    "ratio_9b": dict(dim=192, n_layers=24, n_heads=6, n_kv_heads=3, hidden_dim=864, vocab_size=22816, tied=False),
    "0.5B": dict(**_PAPER, dim=896, n_layers=24, n_heads=14, n_kv_heads=2, hidden_dim=4864),
    "2B": dict(**_PAPER, dim=1792, n_layers=28, n_heads=14, n_kv_heads=2, hidden_dim=10752),
    "3B": dict(**_PAPER, dim=2560, n_layers=28, n_heads=20, n_kv_heads=4, hidden_dim=10240),
    "50M": dict(**_LADDER, dim=512, n_layers=12, n_heads=8, n_kv_heads=4, hidden_dim=1280),
    "150M": dict(**_LADDER, dim=768, n_layers=20, n_heads=12, n_kv_heads=4, hidden_dim=2048),
    "7B": dict(**_LLAMA_2, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008),
    "13B": dict(**_LLAMA_2, dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13824),
}

FLAVORS = {name: partial(llama, **shape) for name, shape in _SHAPES.items()}
# TorchTitan's own Llama 3 8B.
FLAVORS["8B"] = llama3_configs["8B"]


def model_registry(flavor: str, attn_backend: str = "flex") -> ModelSpec:
    """TorchTitan ``ModelSpec`` of a flavor, as `torchtitan.models.llama3.model_registry` returns."""
    return ModelSpec(
        name="llama3",
        flavor=flavor,
        model=FLAVORS[flavor](attn_backend=attn_backend),
        parallelize_fn=parallelize_llama,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=Llama3StateDictAdapter,
    )
