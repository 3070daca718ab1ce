"""Cost of NITP at full size: a step of every variant, counted on fake tensors (`nitp_titan.sizing.step_cost`).

In bfloat16 with float32 reductions, eager.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchtitan.config import OverrideConfig
from torchtitan.config.override import apply_overrides
from torchtitan.distributed.activation_checkpoint import FullAC

from nitp_titan.config import recipe
from nitp_titan.config.parallelism import check_parallelism, data_parallel_ranks
from nitp_titan.config.trained import trained
from nitp_titan.models import llama3
from nitp_titan.progress import log_line, Progress
from nitp_titan.sizing import kernels
from nitp_titan.sizing.fake_world import each_in_a_process
from nitp_titan.sizing.model_size import paper_flops
from nitp_titan.sizing.step_cost import step_cost, StepCost
from nitp_titan.training.trainer import load_config, NITPTrainer
from overhead.variants import variant_configs

CHECKPOINTING = {"none": None, "selective": kernels.KernelSelectiveAC.Config(), "full": FullAC.Config()}


@dataclass(frozen=True)
class Case:
    """One step to count; recipes are those of the project, machines fake."""

    recipe: str
    """Short name of a NITP recipe."""

    variant: str
    """NTP, NITP or MTP."""

    checkpointing: str = "none"
    """Activation checkpointing: a key of `CHECKPOINTING`."""

    num_chunks: int | None = None
    """`[loss] num_chunks`; None for the default."""

    seq_len: int = 8192
    num_ranks: int = 8

    parallelism: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `[parallelism]`; by default FSDP over all ranks."""

    shape: Mapping[str, int] = field(default_factory=dict)
    """Sizes of a llama3 model that differ from the recipe's: arguments of `models.llama3.llama`."""


@dataclass(frozen=True)
class Result(StepCost):
    """Cost of a case for one rank."""

    case: Case

    paper_flops: int
    """App. G's formula for the backbone, per token."""

    paper_nitp_flops: int
    seconds: float


def count_all(cases: Iterable[Case], log: Callable[[str], None] = log_line) -> Iterator[Result]:
    """Count cases, two at a time, each in a process of its own.

    Args:
        log: called with a line when a case is done.

    Yields:
        In the order of ``cases``.

    Raises:
        RuntimeError: in a process that has a process group, which the fake worlds would inherit.
    """
    cases = list(cases)
    progress = Progress(len(cases), "cases")
    for result in each_in_a_process(count, cases):
        case = result.case
        progress.add()
        log(
            f"{progress}: {case.recipe} {case.variant}, {case.seq_len} tokens on {case.num_ranks} ranks, "
            f"checkpointing {case.checkpointing} ({result.seconds:.0f} s)"
        )
        yield result


def count(case: Case) -> Result:
    """Count one case; the process group of the fake world stays behind."""
    start = time.perf_counter()
    config = _config(case)
    step = step_cost(config, case.num_ranks)
    paper = paper_flops(config.model_spec.model)
    return Result(step.cost, step.state_bytes, step.counts, case, *paper, seconds=time.perf_counter() - start)


def _config(case: Case) -> NITPTrainer.Config:
    path, machine = recipe.find(case.recipe, "recipes"), recipe.find("h100x8", "train_configs")
    base = load_config(path, machine)
    spec = base.model_spec
    if case.shape:
        spec = dataclasses.replace(spec, model=llama3.FLAVORS[spec.flavor](attn_backend="flex", **case.shape))
    config = variant_configs(
        path,
        machine,
        model_spec=spec,
        loss=base.loss if case.num_chunks is None else dataclasses.replace(base.loss, num_chunks=case.num_chunks),
        compile=dataclasses.replace(base.compile, enable=False),
        activation_checkpoint=CHECKPOINTING[case.checkpointing],
        override=OverrideConfig(imports=list(kernels.OVERRIDES)),
    )[case.variant]
    parallelism = dataclasses.replace(base.parallelism, **case.parallelism)
    ranks = data_parallel_ranks(parallelism, case.num_ranks)
    training = dataclasses.replace(base.training, seq_len=case.seq_len, local_batch_size=1, global_batch_size=ranks)
    config = dataclasses.replace(config, parallelism=parallelism, training=training)
    check_parallelism(config, case.num_ranks)
    config = dataclasses.replace(config, model_spec=trained(config).model_spec, loss=trained(config).loss)
    config.model_spec.model.update_from_config(config=config)
    apply_overrides(config.override, config)
    return config
