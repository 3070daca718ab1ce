"""Everything that TorchTitan 0.3.0 lacks on CPU, in one place; inert where there is a GPU.

`install` rebinds the device that TorchTitan chose at import time, `prepare` adapts one training
run, `dense_flex_attention` and `float32_experts` are overrides for `[override] imports`.
"""

import dataclasses
import os
import resource
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import spmd_types as spmd
import spmd_types._dist
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spmd_types.runtime import get_partition_spec
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.overrides import TorchFunctionMode
from torchtitan.config import derive, override
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.errors import UserError
from nitp_titan.machine import quiet
from nitp_titan.machine.threads import num_threads

DENSE_ATTENTION = "nitp_titan.machine.cpu.dense_flex_attention"


def active() -> bool:
    """Whether training runs on CPU: no accelerator is available."""
    return not torch.accelerator.is_available()


class _CPUModule(types.ModuleType):
    """The part of ``torch.cuda`` that TorchTitan calls, for a CPU."""

    def __init__(self):
        super().__init__("torch.cpu")

    def __getattr__(self, name: str):
        return getattr(torch.cpu, name)

    def set_device(self, device) -> None: ...

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def synchronize(self, device=None) -> None: ...

    def empty_cache(self) -> None: ...

    def reset_peak_memory_stats(self, device=None) -> None: ...

    def get_device_name(self, device=None) -> str:
        return "CPU"

    def get_device_properties(self, device=None):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return types.SimpleNamespace(total_memory=total, name="CPU")

    def memory_stats(self, device=None) -> dict[str, int]:
        # The peak of the process; Linux counts it in KiB and cannot reset it.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}


class _UnevenAllToAll:
    """``torch.distributed`` whose list-form all_to_all accepts uneven sizes, which gloo's does not."""

    def __getattr__(self, name: str):
        return getattr(dist, name)

    @staticmethod
    def all_to_all(outputs, inputs, group=None, async_op=False):
        out_sizes = [output.shape[0] for output in outputs]
        received = inputs[0].new_empty([sum(out_sizes), *inputs[0].shape[1:]])
        dist.all_to_all_single(received, torch.cat(inputs), out_sizes, [x.shape[0] for x in inputs], group=group)
        for output, part in zip(outputs, received.split(out_sizes)):
            output.copy_(part)


def install() -> None:
    """Make TorchTitan use the CPU, with `threads.num_threads`; does nothing where there is an accelerator.

    Works before and after TorchTitan's modules are imported, so the stock entry point is served too.
    """
    if not active():
        return
    quiet.install_on_cpu()
    module = _CPUModule()
    for name, loaded in list(sys.modules.items()):
        if name.startswith("torchtitan"):
            for attribute, value in (("device_type", "cpu"), ("device_module", module)):
                if attribute in vars(loaded):
                    setattr(loaded, attribute, value)
    spmd_types._dist.set_dist(_UnevenAllToAll())
    torch.set_num_threads(num_threads())


def prepare(config):
    """Check that a training config can run on CPU, and adapt its model; the config itself without CPU.

    Raises:
        UserError: if the config asks for what only a GPU has.
    """
    if not active():
        return config
    if DENSE_ATTENTION not in config.override.imports or config.model.attn_backend != "flex":
        raise UserError(
            "There is no GPU here, and these settings need one. On CPU use --train-config train_configs/cpu.toml "
            f"(it sets [model] attn_backend = 'flex' and [override] imports = ['{DENSE_ATTENTION}'])."
        )
    if config.training.enable_cpu_offload:
        raise UserError(
            "[training] enable_cpu_offload = true needs a GPU: without one the states are on the CPU already.",
            table="training",
            key="enable_cpu_offload",
        )
    if not config.compile.enable:
        # TorchTitan always compiles the attention mask; without this a C++ compiler is needed.
        torch.compiler.set_stance("force_eager")
    return dataclasses.replace(config, model_spec=with_gloo_reduction(config.model_spec))


def with_gloo_reduction(spec: ModelSpec) -> ModelSpec:
    """The same model, its FSDP units reducing gradients with the one operation that gloo has."""

    def parallelize(model, **kwargs):
        model = spec.parallelize_fn(model, **kwargs)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo has no PREMUL_SUM, which FSDP uses for a divide factor of 1.
                module.set_force_sum_reduction_for_comms(True)
        return model

    return dataclasses.replace(spec, parallelize_fn=parallelize)


class DenseFlexAttention(FlexAttention):
    """FlexAttention evaluated densely: its CPU kernel has no backward."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        pass

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: BlockMask,
        score_mod: Callable | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Same shapes as `FlexAttention.forward`; raises NotImplementedError for score_mod."""
        if score_mod is not None:
            raise NotImplementedError("DenseFlexAttention has no score_mod: on a CPU SDPA takes a mask only.")
        with spmd.no_typecheck():
            # Under context parallelism there are more keys than queries.
            mask = _dense_mask(attention_masks, q_BLNH.shape[0], q_BLNH.shape[1], k_BLNH.shape[1], q_BLNH.device)
            q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
            if out_transform is None:
                lse_BLN = None
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
            else:
                out, lse = _attention_with_lse(q, k, v, mask, scale)
                lse_BLN = lse.transpose(1, 2)
            out_BLNH = out.transpose(1, 2).contiguous()
        _copy_spmd_type(q_BLNH, out_BLNH, lse_BLN)
        return out_BLNH if out_transform is None else out_transform(out_BLNH, lse_BLN)


def _attention_with_lse(q, k, v, mask, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [batch, heads, queries, dim] and, what SDPA does not return, its log-sum-exp."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v, lse


def _copy_spmd_type(q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Under SPMD typechecking the output is sharded as the query is (`FlexAttention.compiled_flex_attn`)."""
    if get_spmd_backend() != "spmd_types" or not spmd.is_type_checking():
        return
    spec = get_partition_spec(q)
    spmd.assert_type(out, spmd.get_local_type(q), spec)
    if lse is not None:
        spmd.assert_type(lse, spmd.get_local_type(q), None if spec is None else spmd.PartitionSpec(*spec[:-1]))


# As many as a model has kinds of masks: gpt_oss has two, and its layers take them in turn.
@lru_cache(maxsize=2)
def _dense_mask(mask: BlockMask, batch: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """[batch, 1, queries, keys], bool; the layers of a pass share their masks, so each is evaluated once."""
    return create_mask(mask.mask_mod, batch, 1, queries, keys, device=device)


@override(target=FlexAttention.Config, description="FlexAttention evaluated densely, for CPU")
def dense_flex_attention(config: FlexAttention.Config) -> DenseFlexAttention.Config:
    return derive(config, DenseFlexAttention.Config)


class _KeepFloat32(TorchFunctionMode):
    """Makes ``Tensor.bfloat16`` a no-op, with which TorchTitan's experts begin whatever the training precision."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16:
            return args[0]
        return function(*args, **(kwargs or {}))


@cache
def _float32(experts: type[GroupedExperts]) -> type[GroupedExperts]:
    class Float32Experts(experts):
        @dataclass(kw_only=True, slots=True)
        class Config(experts.Config):
            pass

        def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
            # torch.compile's trace of grouped products takes half precision only.
            if torch.compiler.is_compiling():
                return super().forward(x_RD, num_tokens_per_expert_E)
            with _KeepFloat32():
                return super().forward(x_RD, num_tokens_per_expert_E)

    Float32Experts.__name__ = Float32Experts.__qualname__ = f"Float32{experts.__name__}"
    return Float32Experts


@override(target=GroupedExperts.Config, description="Experts computed in the type of their input, for CPU")
def float32_experts(config: GroupedExperts.Config) -> GroupedExperts.Config:
    return derive(config, _float32(type(config)._owner).Config)
