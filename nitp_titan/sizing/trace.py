"""What a training step costs, counted operator by operator: FLOPs, memory and communication.

Works on real CPU tensors and on fake ones (torch's FakeTensorMode) alike: only shapes and lifetimes are looked at. What
happens inside an operator, such as a kernel's workspace, is not seen.
"""

import dataclasses
import gc
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn, Tensor
from torch._guards import active_fake_mode

# Also registers fake implementations of the in-place collectives that FSDP calls.
from torch.distributed._tools.fake_collectives import collective_ops, CollectiveOp, sync_ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

# In this order: "reduce" is how "reduce_scatter" begins.
_KINDS = ("all_gather", "all_reduce", "all_to_all", "reduce_scatter", "broadcast", "send", "recv", "reduce")


@dataclass(frozen=True)
class Collective:
    """A kind of communication."""

    kind: str
    """all_gather, all_reduce, all_to_all, reduce_scatter, broadcast, send, recv or reduce; the operator's name else."""

    group: str
    """Mesh axis that the ranks belong to, or ``world``."""

    num_ranks: int
    """Ranks that take part."""


@dataclass(frozen=True)
class Traffic:
    """How often a rank takes part in a kind of communication, and with how many bytes."""

    calls: int = 0

    payload: int = 0
    """Bytes of the tensor on the larger side: what an all-gather returns, what a reduce-scatter takes, what an
    all-reduce sums up. Over a ring of n ranks (n - 1) / n of them are sent, twice for an all-reduce."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.calls + other.calls, self.payload + other.payload)

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.calls - other.calls, self.payload - other.payload)


@dataclass(frozen=True)
class Cost:
    """What one rank does in a step."""

    matmul_flops: int
    """Of matrix products, grouped ones included: 2 m n k."""

    attention_flops: int
    """Of attention kernels: scores, values, and in the backward pass the scores once more. A causal mask's zeros count
    like all else (the convention of torch.utils.flop_counter)."""

    peak_bytes: int
    """Largest sum of the bytes of storages that were created in the step and alive at the same time. FSDP's buffers of
    gathered parameters are created in the first step."""

    collectives: dict[Collective, Traffic]

    prefetched_gathers: int
    """FSDP's all-gathers that start before other work and not when their parameters are needed: there are matrix
    products between start and use, with which they can overlap."""

    @property
    def flops(self) -> int:
        return self.matmul_flops + self.attention_flops


def trace(step: Callable[[], object]) -> Cost:
    """Run a step and count what it costs.

    Python's garbage collector rests meanwhile, as in TorchTitan's training: what only a cycle keeps alive, counts.

    Args:
        step: forward, loss and backward, run once. Parameters without a gradient get one in it, which then counts as
            memory; see `preset_gradients`.
    """
    flops, memory, communication = _Flops(), _Memory(), _Communication()
    with _no_garbage_collection(), _Watched(flops, memory, communication):
        step()
    attention = sum(count for operator, count in flops.counts.items() if "attention" in str(operator))
    return Cost(
        matmul_flops=sum(flops.counts.values()) - attention,
        attention_flops=attention,
        peak_bytes=memory.peak,
        collectives=dict(communication.seen),
        prefetched_gathers=communication.num_prefetched,
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def preset_gradients(model: nn.Module) -> None:
    """Give every parameter a gradient of zeros, so that a traced step creates activations and transients alone."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def added(cost: Cost, baseline: Cost) -> dict[Collective, Traffic]:
    """The communication that one step has and another lacks; negative where it has less of it."""
    none = Traffic()
    every = {*cost.collectives, *baseline.collectives}
    differences = {key: cost.collectives.get(key, none) - baseline.collectives.get(key, none) for key in every}
    return {key: traffic for key, traffic in differences.items() if traffic != none}


def as_rows(collectives: dict[Collective, Traffic]) -> list[dict]:
    """Communication as plain dictionaries: kind, group, num_ranks, calls, payload (bytes); the largest first."""
    rows = [dataclasses.asdict(key) | dataclasses.asdict(traffic) for key, traffic in collectives.items()]
    return sorted(rows, key=lambda row: -abs(row["payload"]))


# What torch.utils.flop_counter has no formula for.
@register_flop_formula(torch.ops.aten._grouped_mm)
def _grouped_mm_flops(a: tuple[int, ...], b: tuple[int, ...], *args, out_shape=None, **kwargs) -> int:
    """Of groups of rows times a matrix each (2D, 3D), or of sums over groups of rows (2D, 2D): one product's work."""
    batch = a[0] if len(a) == len(b) == 3 else 1
    return 2 * batch * a[-2] * a[-1] * b[-1]


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


class _Flops:
    """Counts by operator, with the formulas of torch.utils.flop_counter.

    Its own FlopCounterMode hooks every module's inputs, and so keeps activations alive.
    """

    def __init__(self):
        self.counts: Counter[torch._ops.OpOverloadPacket] = Counter()

    def see(self, operator, args: tuple, kwargs: dict, result: object) -> None:
        if (formula := flop_registry.get(operator._overloadpacket)) is not None:
            self.counts[operator._overloadpacket] += formula(*args, **kwargs, out_val=result)


class _Memory:
    """Peak of the bytes of the storages whose creation it sees."""

    def __init__(self):
        self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._created: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def see(self, operator, args: tuple, kwargs: dict, result: object) -> None:
        """Storages first seen as a result are new, unless the operator was given them."""
        self._seen.update(_storages((args, kwargs)))
        new = [storage for storage in _storages(result) if storage not in self._seen]
        if new:
            self._seen.update(new)
            self._created.update(new)
            # Added up anew each time: FSDP frees and refills its storages without an operator.
            self.peak = max(self.peak, sum(storage.nbytes() for storage in self._created))


class _Communication:
    """Counts collectives: FSDP's in-place ones (c10d), functional ones, and messages of pipelines."""

    def __init__(self):
        self.seen: dict[Collective, Traffic] = defaultdict(Traffic)
        self.num_prefetched = 0
        # For every all-gather of FSDP under way, whether a matrix product came after it.
        self._under_way: deque[bool] = deque()

    def see(self, operator, args: tuple, kwargs: dict, result: object) -> None:
        if operator in collective_ops and operator not in sync_ops:
            group = CollectiveOp.get_process_group(operator, args)
            name = operator._opname.replace("_", "")
            kind = next((kind for kind in _KINDS if name.startswith(kind.replace("_", ""))), name)
            payload = max(_bytes(part) for part in (*args, *kwargs.values(), result))
            self.seen[Collective(kind, _axis(group), group.size())] += Traffic(1, payload)
        if operator is torch.ops.fsdp.all_gather_copy_in.default:
            self._under_way.append(False)
        elif operator is torch.ops.fsdp.split_with_sizes_copy.default and self._under_way:
            self.num_prefetched += self._under_way.popleft()
        elif operator in _PRODUCTS:
            self._under_way = deque([True] * len(self._under_way))


_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._grouped_mm.default}


class _Watched(TorchDispatchMode):
    """Shows watchers every operator on plain or fake tensors that a program runs."""

    def __init__(self, *watchers: _Flops | _Memory | _Communication):
        super().__init__()
        self.watchers = watchers

    def __enter__(self):
        self._fake_mode = active_fake_mode()
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            # DTensors and tensors in flight run the same operator again, on what they hold.
            return NotImplemented
        if operator is torch.ops._c10d_functional.wait_tensor.default:
            # Its fake implementation returns a copy, the real one does not.
            return args[0]
        result = operator(*args, **kwargs)
        # DTensor asks for the shapes of whole tensors under a fake mode of its own.
        if operator is not torch.ops.prim.device.default and active_fake_mode() is self._fake_mode:
            for watcher in self.watchers:
                watcher.see(operator, args, kwargs, result)
        return result


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tree: object) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _axis(group: dist.ProcessGroup) -> str:
    return group.group_desc.removeprefix("mesh_") if group.group_desc.startswith("mesh_") else "world"
