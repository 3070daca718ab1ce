"""TorchTitan's multi-token prediction (DeepSeek-V3, depth 1) on any decoder: what NITP's cost is compared with."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import spmd_types as spmd
from torch import nn
from torchtitan.models.common import Linear
from torchtitan.models.common.decoder import Decoder, TransformerBlock
from torchtitan.models.common.decoder_sharding import (
    dense_activation_placement,
    dense_param_placement,
    dense_sequence_parallel_placement,
    norm_config,
    pre_lm_head_norm_config,
)
from torchtitan.models.deepseek_v3.mtp import MTPDecoder, MTPTransformerBlock
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.sharding import ShardingConfig


def with_mtp(spec: ModelSpec) -> ModelSpec:
    """The same backbone with one MTP layer: a copy of the last layer, behind a projection of two states into one.

    Args:
        spec: a decoder whose layers are TorchTitan's standard blocks. Its loss has to be TorchTitan's ``MTPLoss``.

    Returns:
        A new spec, for data parallelism alone: as TorchTitan's own MTP, without pipeline and context parallelism.
    """
    base = type(spec.model)._owner
    fields = {field.name: getattr(spec.model, field.name) for field in dataclasses.fields(spec.model)}
    model = _mtp_model_class(base).Config(**fields, mtp_layers=[_mtp_layer(spec.model)])
    return dataclasses.replace(
        spec, model=model, parallelize_fn=_with_mtp_parallelize(spec.parallelize_fn), pipelining_fn=None
    )


def _mtp_layer(model: Decoder.Config) -> MTPTransformerBlock.Config:
    layer = copy.deepcopy(model.layers[-1])
    block = {field.name: getattr(layer, field.name) for field in dataclasses.fields(TransformerBlock.Config)}
    init = {"weight": partial(nn.init.trunc_normal_, std=0.02)}
    return MTPTransformerBlock.Config(
        **block,
        enorm=copy.deepcopy(model.norm),
        hnorm=copy.deepcopy(model.norm),
        mtp_norm=copy.deepcopy(model.norm),
        eh_proj=Linear.Config(in_features=2 * model.dim, out_features=model.dim, param_init=init),
    )


@cache
def _mtp_model_class(base: type[Decoder]) -> type[Decoder]:
    class MTPModel(MTPDecoder, base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            mtp_layers: list

            def update_from_config(self, *, config, **kwargs) -> None:
                # As MTPDecoder.Config, on top of the family's own.
                num_layers = len(self.layers)
                self.layers.extend(self.mtp_layers)
                try:
                    base.Config.update_from_config(self, config=config, **kwargs)
                finally:
                    del self.layers[num_layers:]
                for layer in self.mtp_layers:
                    _set_mtp_sharding(layer, enable_sp=config.parallelism.enable_sequence_parallel)

    MTPModel.__name__ = MTPModel.__qualname__ = f"MTP{base.__name__}"
    return MTPModel


def _set_mtp_sharding(layer: MTPTransformerBlock.Config, *, enable_sp: bool) -> None:
    """Of what an MTP layer has beside a layer, as DeepSeek-V3's `set_deepseek_v3_sharding_config` has it."""
    sharded = dense_sequence_parallel_placement() if enable_sp else dense_activation_placement(tp=spmd.I)
    if enable_sp:
        layer.sharding_config = ShardingConfig(
            in_src_shardings={"mtp_input_valid_mask": dense_activation_placement(tp=spmd.R)},
            in_dst_shardings={"mtp_input_valid_mask": sharded},
        )
    layer.enorm.sharding_config = layer.hnorm.sharding_config = norm_config(enable_sp=enable_sp)
    layer.mtp_norm.sharding_config = pre_lm_head_norm_config(enable_sp=enable_sp)
    layer.eh_proj.sharding_config = ShardingConfig(
        state_shardings={"weight": dense_param_placement(tp=spmd.R)},
        in_src_shardings={"input": sharded},
        out_src_shardings=sharded,
    )


def _with_mtp_parallelize(parallelize_fn: Callable) -> Callable:
    """Wrap a family's parallelize function: the MTP layers are treated as its layers are."""

    def parallelize(model: nn.Module, **kwargs) -> nn.Module:
        mtp_layers, num_layers = model.mtp_layers, len(model.layers)
        model.mtp_layers = None
        for depth, layer in enumerate(mtp_layers):
            model.layers[str(num_layers + depth)] = layer
        model = parallelize_fn(model, **kwargs)
        for depth in range(len(mtp_layers)):
            mtp_layers[depth] = model.layers.pop(str(num_layers + depth))
        model.mtp_layers = mtp_layers
        return model

    return parallelize
