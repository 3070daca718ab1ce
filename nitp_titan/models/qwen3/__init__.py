"""TorchTitan's Qwen3 (dense and mixture of experts), with debug flavors for a CPU."""

import dataclasses
import inspect

from torchtitan.models import qwen3
from torchtitan.models.common import CosSinRoPE
from torchtitan.models.qwen3 import _build_qwen3_layers, _build_qwen3_moe_layers, Qwen3Model
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.models.debug import debug_decoder, DIM
from nitp_titan.models.qwen3.hf import hf_config

__all__ = ["FLAVORS", "hf_config", "model_registry"]

_SHAPE = dict(dim=DIM, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=24)


def _rope() -> CosSinRoPE.Config:
    return CosSinRoPE.Config(dim=_SHAPE["head_dim"], max_seq_len=4096, theta=1000000.0)


def _debug(attn_backend: str) -> Qwen3Model.Config:
    """Tied, like Qwen3's small models."""
    layers = _build_qwen3_layers(**_SHAPE, hidden_dim=256, attn_backend=attn_backend, rope=_rope())
    return debug_decoder(qwen3.qwen3_configs["debugmodel"](attn_backend), layers)


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
    return debug_decoder(qwen3.qwen3_configs["debugmodel_moe"](attn_backend), layers)


FLAVORS = {**qwen3.qwen3_configs, "debug": _debug, "debug_moe": _debug_moe}


def model_registry(flavor: str, attn_backend: str = "flex", moe_comm_backend: str | None = None) -> ModelSpec:
    """TorchTitan's ``ModelSpec``; a dense flavor has no use for a token dispatcher and ignores it."""
    backends = {"attn_backend": attn_backend}
    if moe_comm_backend is not None and "moe_comm_backend" in inspect.signature(FLAVORS[flavor]).parameters:
        backends["moe_comm_backend"] = moe_comm_backend
    spec = qwen3.model_registry("debugmodel")
    return dataclasses.replace(spec, flavor=flavor, model=FLAVORS[flavor](**backends))
