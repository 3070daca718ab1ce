"""TorchTitan's Qwen3 (dense and mixture of experts), with debug flavors for a CPU."""

import dataclasses
import inspect

from torchtitan.models import qwen3
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.qwen3 import _build_qwen3_layers, _build_qwen3_moe_layers, Qwen3Model
from torchtitan.protocols.model_spec import ModelSpec

_DIM, _VOCABULARY = 96, 4096
_SHAPE = dict(dim=_DIM, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=24)


def _decoder(layers: list, *, tied: bool) -> Qwen3Model.Config:
    embedding = qwen3._EMBEDDING_SKIP_INIT if tied else qwen3._EMBEDDING_INIT
    return Qwen3Model.Config(
        dim=_DIM,
        vocab_size=_VOCABULARY,
        enable_weight_tying=tied,
        tok_embeddings=Embedding.Config(num_embeddings=_VOCABULARY, embedding_dim=_DIM, param_init=embedding),
        norm=qwen3._qwen3_norm(_DIM),
        lm_head=Linear.Config(in_features=_DIM, out_features=_VOCABULARY, param_init=qwen3._LINEAR_INIT),
        layers=layers,
    )


def _rope() -> CosSinRoPE.Config:
    return CosSinRoPE.Config(dim=_SHAPE["head_dim"], max_seq_len=4096, theta=1000000.0)


def _debug(attn_backend: str) -> Qwen3Model.Config:
    """Tied like Qwen3's small models."""
    layers = _build_qwen3_layers(**_SHAPE, hidden_dim=256, attn_backend=attn_backend, rope=_rope())
    return _decoder(layers, tied=True)


def _debug_moe(attn_backend: str, moe_comm_backend: str = "standard") -> Qwen3Model.Config:
    layers = _build_qwen3_moe_layers(
        **_SHAPE,
        moe_hidden_dim=48,
        num_experts=16,
        top_k=4,
        attn_backend=attn_backend,
        moe_comm_backend=moe_comm_backend,
        rope=_rope(),
    )
    return _decoder(layers, tied=False)


FLAVORS = {**qwen3.qwen3_configs, "debug": _debug, "debug_moe": _debug_moe}


def model_registry(flavor: str, attn_backend: str = "flex", moe_comm_backend: str | None = None) -> ModelSpec:
    """TorchTitan's ``ModelSpec``; a dense flavor has no use for a token dispatcher and ignores it."""
    backends = {"attn_backend": attn_backend}
    if moe_comm_backend is not None and "moe_comm_backend" in inspect.signature(FLAVORS[flavor]).parameters:
        backends["moe_comm_backend"] = moe_comm_backend
    spec = qwen3.model_registry("debugmodel")
    return dataclasses.replace(spec, flavor=flavor, model=FLAVORS[flavor](**backends))
