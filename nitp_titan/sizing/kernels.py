"""What a GPU computes in one kernel and this CPU in many operators: overrides for counting on fake tensors.

A kernel keeps for the backward pass what is listed here; the operators that stand for it on a CPU keep more.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.config import derive, override
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common import RMSNorm
from torchtitan.models.common.attention import FlexAttention

OVERRIDES = [f"{__name__}.flash_attention", f"{__name__}.fused_rms_norm"]


class FlashAttention(FlexAttention):
    """Plain causal attention, whose memory is linear in the sequence: keeps its inputs, output and log-sum-exp.

    So does FlexAttention's kernel; its mask of blocks is left out.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        pass

    def forward(self, q_BLNH, k_BLNH, v_BLNH, *, scale=None, enable_gqa=False, **kwargs) -> Tensor:
        """Same shapes as `FlexAttention.forward`; no documents, score_mod or out_transform."""
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)


@override(target=FlexAttention.Config, description="Causal attention of linear memory, for counting")
def flash_attention(config: FlexAttention.Config) -> FlashAttention.Config:
    return derive(config, FlashAttention.Config)


class KernelSelectiveAC(SelectiveAC):
    """TorchTitan's selective checkpointing, which keeps the outputs of a GPU's attention kernels: a CPU's as well."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set:
        return super().get_save_ops() | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}


@torch.library.custom_op("nitp_titan::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * rstd * weight.float()).to(x.dtype), rstd


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("nitp_titan::rms_norm_backward", mutates_args=())
def _rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    unit, gradient = x.float() * rstd, gradient.float()
    inner = gradient * weight.float()
    grad_x = rstd * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    grad_weight = (gradient * unit).flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@_rms_norm_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, gradient: Tensor, _) -> tuple[Tensor, Tensor, None]:
    return *_rms_norm_backward(gradient.contiguous(), *ctx.saved_tensors), None


_rms_norm.register_autograd(_backward, setup_context=_keep)


class FusedRMSNorm(RMSNorm):
    """RMSNorm that keeps its input and one number per token, as the CUDA kernel behind `torch.nn.RMSNorm` does."""

    @dataclass(kw_only=True, slots=True)
    class Config(RMSNorm.Config):
        pass

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight, self.eps)[0]


@override(target=RMSNorm.Config, description="RMSNorm as one kernel, for counting")
def fused_rms_norm(config: RMSNorm.Config) -> FusedRMSNorm.Config:
    return derive(config, FusedRMSNorm.Config)
