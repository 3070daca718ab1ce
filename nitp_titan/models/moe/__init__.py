"""The paper's mixture-of-experts decoders: DeepSeek-V2 style experts under grouped-query attention.

One leading dense layer, then layers of routed SwiGLU experts with one shared expert, softmax routing
with normalised top-k and TorchTitan's bias balancing, untied embeddings. The blocks, kernels, token
dispatchers and parallelism are those of TorchTitan's qwen3, whose decoder has them all.
"""

from functools import partial

import torch.nn as nn
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.qwen3 import parallelize_qwen3, Qwen3Model
from torchtitan.models.qwen3.model import Qwen3TransformerBlock
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.models.moe.hf import hf_config
from nitp_titan.models.moe.state_dict_adapter import Ernie4_5MoeStateDictAdapter

__all__ = ["FLAVORS", "gqa_moe", "hf_config", "model_registry"]

# As TorchTitan's qwen3: one standard deviation, the outputs of the residual branches scaled by depth.
_STD = 0.02
_NORM = {"weight": nn.init.ones_}
_WEIGHT = {"weight": partial(nn.init.normal_, std=_STD)}


def _moe(
    *,
    dim: int,
    num_experts: int,
    top_k: int,
    hidden_dim: int,
    output_std: float,
    comm_backend: str,
    load_balance_coeff: float,
):
    experts = {name: partial(nn.init.normal_, std=_STD) for name in ("w1_EFD", "w3_EFD")}
    return make_moe_config(
        num_experts=num_experts,
        router=make_router_config(
            dim=dim,
            num_experts=num_experts,
            gate_param_init=_WEIGHT,
            top_k=top_k,
            score_func="softmax",
            route_norm=True,
        ),
        routed_experts=make_routed_experts_config(
            dim=dim,
            hidden_dim=hidden_dim,
            num_experts=num_experts,
            top_k=top_k,
            param_init={**experts, "w2_EDF": partial(nn.init.normal_, std=output_std)},
            comm_backend=comm_backend,
        ),
        shared_experts=_feed_forward(dim=dim, hidden_dim=hidden_dim, output_std=output_std),
        load_balance_coeff=load_balance_coeff,
    )


def _feed_forward(*, dim: int, hidden_dim: int, output_std: float):
    feed_forward = make_ffn_config(dim=dim, hidden_dim=hidden_dim, w1_param_init=_WEIGHT, w2w3_param_init=_WEIGHT)
    feed_forward.w2.param_init = {"weight": partial(nn.init.normal_, std=output_std)}
    return feed_forward


def gqa_moe(
    *,
    attn_backend: str,
    moe_comm_backend: str,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    dense_hidden_dim: int,
    expert_hidden_dim: int,
    num_experts: int,
    top_k: int,
    vocab_size: int,
    rope_theta: float = 500000,
    load_balance_coeff: float = 1e-3,
) -> Qwen3Model.Config:
    """Config of a mixture-of-experts decoder of the paper (Table 4, App. C).

    Args:
        dim: model dimension; the head dimension is ``dim / n_heads``.
        n_layers: layers in all, the leading dense one included.
        dense_hidden_dim: width of the dense layer's feed-forward.
        expert_hidden_dim: width of each routed expert and of the shared one.
        top_k: routed experts per token.
        moe_comm_backend: token dispatcher, see `ModelConfig.moe_comm_backend`.
        load_balance_coeff: what an expert's selection bias moves by per step (TorchTitan's default).
    """
    output_std = _STD / (2 * n_layers) ** 0.5
    layers = []
    for layer_id in range(n_layers):
        feed_forward = moe = None
        if layer_id == 0:
            feed_forward = _feed_forward(dim=dim, hidden_dim=dense_hidden_dim, output_std=output_std)
        else:
            moe = _moe(
                dim=dim,
                num_experts=num_experts,
                top_k=top_k,
                hidden_dim=expert_hidden_dim,
                output_std=output_std,
                comm_backend=moe_comm_backend,
                load_balance_coeff=load_balance_coeff,
            )
        attention = make_gqa_config(
            dim=dim,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=dim // n_heads,
            wqkv_param_init=_WEIGHT,
            wo_param_init={"weight": partial(nn.init.normal_, std=output_std)},
            inner_attention=get_attention_config(attn_backend),
            fuse_qkv=True,
            rope=ComplexRoPE.Config(dim=dim // n_heads, max_seq_len=131072, theta=rope_theta),
        )
        layers.append(
            Qwen3TransformerBlock.Config(
                attention=attention,
                feed_forward=feed_forward,
                moe=moe,
                attention_norm=RMSNorm.Config(normalized_shape=dim, param_init=_NORM),
                ffn_norm=RMSNorm.Config(normalized_shape=dim, param_init=_NORM),
            )
        )
    return Qwen3Model.Config(
        dim=dim,
        vocab_size=vocab_size,
        tok_embeddings=Embedding.Config(num_embeddings=vocab_size, embedding_dim=dim, param_init=_WEIGHT),
        norm=RMSNorm.Config(normalized_shape=dim, param_init=_NORM),
        lm_head=Linear.Config(in_features=dim, out_features=vocab_size, param_init=_WEIGHT),
        layers=layers,
    )


_QWEN2_VOCABULARY = 152064
_PAPER = dict(num_experts=144, vocab_size=_QWEN2_VOCABULARY)

FLAVORS = {
    # Small enough for two CPU cores, shaped like the paper's: one dense layer, many narrow experts.
    "debug": dict(
        dim=96,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        dense_hidden_dim=256,
        expert_hidden_dim=48,
        num_experts=16,
        top_k=4,
        vocab_size=4096,
        # A ninth of the experts have nine times the score; at 1e-3 the router settles on four of them (recipes/LOG.md).
        load_balance_coeff=1e-2,
    ),
    "1.9B-A0.3B": dict(
        **_PAPER, dim=512, n_layers=16, n_heads=8, n_kv_heads=4, dense_hidden_dim=10944, expert_hidden_dim=496, top_k=8
    ),
    "3B-A0.5B": dict(
        **_PAPER, dim=768, n_layers=17, n_heads=8, n_kv_heads=4, dense_hidden_dim=10944, expert_hidden_dim=544, top_k=8
    ),
    "9B-A1B": dict(
        **_PAPER, dim=1280, n_layers=24, n_heads=8, n_kv_heads=4, dense_hidden_dim=10944, expert_hidden_dim=640, top_k=8
    ),
    # arXiv v1 only: the authors dropped it in v2.
    "45B-A5.5B": dict(
        **_PAPER,
        dim=3072,
        n_layers=24,
        n_heads=24,
        n_kv_heads=8,
        dense_hidden_dim=12288,
        expert_hidden_dim=1408,
        top_k=12,
    ),
}


def model_registry(flavor: str, attn_backend: str = "flex", moe_comm_backend: str = "standard") -> ModelSpec:
    """TorchTitan ``ModelSpec`` of a flavor; the signature of `torchtitan.models.qwen3.model_registry`."""
    return ModelSpec(
        name="moe",
        flavor=flavor,
        model=gqa_moe(attn_backend=attn_backend, moe_comm_backend=moe_comm_backend, **FLAVORS[flavor]),
        parallelize_fn=parallelize_qwen3,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=register_moe_load_balancing_hook,
        state_dict_adapter=Ernie4_5MoeStateDictAdapter,
    )
