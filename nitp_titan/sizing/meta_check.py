"""Try a recipe on a train config at full size: built on the meta device, parallelized on a fake world.

No weights are allocated and nothing is trained, so a model of 45B parameters on 128 ranks takes seconds.
"""

import dataclasses
import logging
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import get_peak_flops

from nitp_titan.config import recipe
from nitp_titan.config.parallelism import check_parallelism, data_parallel_ranks
from nitp_titan.config.trained import trained
from nitp_titan.errors import UserError
from nitp_titan.machine import cpu
from nitp_titan.sizing.fake_world import each_in_a_process, fake_world, meta_model, parallelize_options
from nitp_titan.sizing.model_size import Counts
from nitp_titan.training.trainer import load_config

# Share of a GPU's peak FLOPs that the expected cost assumes.
ASSUMED_MFU = 0.4
# Gradient and the two moments of AdamW, each as large as the parameter.
_STATES_PER_PARAMETER = {"parameters": 1, "gradients": 1, "optimizer": 2}


@dataclasses.dataclass(frozen=True)
class Check:
    """One recipe on one train config, seen from one rank."""

    recipe: Path
    train_config: Path
    rank: int


def check(pairs: Iterable[tuple[Path, Path]]) -> Iterator[dict[str, Any]]:
    """Check recipes on train configs, two at a time.

    Yields:
        In the order of ``pairs``, the result of one check: see `_result`, or ``"error"`` with the reason in one
        line, and always ``recipe``, ``train_config``, ``seconds`` of the processor and ``memory_gib``.

    Raises:
        RuntimeError: in a process that has a process group, which the fake world of a check would inherit.
    """
    by_pair = [[Check(*pair, rank) for rank in _first_ranks(*pair)] for pair in pairs]
    results = each_in_a_process(_run, [job for stages in by_pair for job in stages])
    for stages in by_pair:
        yield _merged([next(results) for _ in stages])


def _first_ranks(recipe_path: Path, train_config: Path) -> list[int]:
    """One rank per pipeline stage; the other ranks of a stage hold as much."""
    try:
        tables = recipe.read_settings(recipe_path, train_config).tables
    except UserError:
        return [0]
    stages = tables.get("parallelism", {}).get("pipeline_parallel_degree", 1)
    ranks = tables.get("machine", {}).get("num_ranks", 1)
    whole = isinstance(stages, int) and isinstance(ranks, int) and 0 < stages <= ranks
    return [stage * (ranks // stages) for stage in range(stages)] if whole else [0]


def _merged(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of the stage whose ranks hold most, or the first error."""
    failed = [stage for stage in stages if "error" in stage]
    merged = dict(failed[0] if failed else max(stages, key=lambda stage: stage["rank_parameters"]))
    for effort in ("seconds", "memory_gib"):
        merged[effort] = max(stage[effort] for stage in stages)
    return merged


def _run(job: Check) -> dict[str, Any]:
    start = time.process_time()
    result: dict[str, Any] = {"recipe": str(job.recipe), "train_config": str(job.train_config)}
    try:
        result |= _result(job)
    except (ValueError, NotImplementedError, AssertionError) as error:
        # Ours, or TorchTitan's own refusal of a layout.
        result["error"] = " ".join(str(error).split()) or type(error).__name__
    result["seconds"] = time.process_time() - start
    result["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result


def _result(job: Check) -> dict[str, Any]:
    config = load_config(job.recipe, job.train_config)
    machine, training = config.machine, config.training
    check_parallelism(config, machine.num_ranks)
    counts, parts = _build(config, job.rank)
    local = sum(_local_size(part, tied=config.model_spec.model.enable_weight_tying) for part in parts)
    size = torch.empty([], dtype=TORCH_DTYPE_MAP[training.dtype]).element_size()
    rank_bytes = {name: copies * local * size for name, copies in _STATES_PER_PARAMETER.items()}
    rank_bytes["total"] = sum(rank_bytes.values())
    _check_memory(config, rank_bytes["total"])
    data_ranks = data_parallel_ranks(config.parallelism, machine.num_ranks)
    tokens = training.steps * training.global_batch_size * training.seq_len
    return {
        "model": f"{config.model.family} {config.model.flavor}",
        "nitp": {"weight": config.nitp.weight, "target_layer": config.nitp.target_layer}
        if config.nitp.enabled
        else None,
        **dataclasses.asdict(counts),
        "nitp_overhead": counts.nitp_overhead,
        "note": config.nitp.untrained_warning(training.steps),
        "ranks": machine.num_ranks,
        "device": machine.device,
        "rank_parameters": local,
        "rank_bytes": rank_bytes,
        "steps": training.steps,
        "seq_len": training.seq_len,
        "tokens": tokens,
        "global_batch_size": training.global_batch_size,
        "local_batch_size": training.local_batch_size,
        "data_parallel_ranks": data_ranks,
        "accumulation_steps": training.global_batch_size // (training.local_batch_size * data_ranks),
        "device_hours": device_hours(counts, tokens, machine.device),
    }


def counts_of(recipe_path: Path, train_config: Path) -> Counts:
    """Counts of a recipe's model, built on the meta device; no fake world is needed."""
    cpu.install()
    logger.setLevel(logging.ERROR)
    config = load_config(recipe_path, train_config)
    return meta_model(_spec(config), config.training.seq_len)[1]


def device_hours(counts: Counts, tokens: int, device: str) -> float | None:
    """Hours of one device for a training run at `ASSUMED_MFU`; None for a CPU."""
    if device == "CPU":
        return None
    flops = counts.flops + counts.attention_flops + counts.nitp_flops
    return flops * tokens / (ASSUMED_MFU * get_peak_flops(device)) / 3600


def _check_memory(config, states: int) -> None:
    limit = config.machine.device_memory_gib
    if limit is None or config.training.enable_cpu_offload or states <= limit * 2**30:
        return
    raise UserError(
        f"[machine] device_memory_gib = {limit:g}, but parameters, gradients and optimizer states of one rank take "
        f"{states / 2**30:.1f} GiB before any activation; shard over more ranks."
    )


def _build(config, rank: int) -> tuple[Counts, list[torch.nn.Module]]:
    """Counts of the whole model, and the parts of it that one rank of the fake world holds."""
    parallel_dims = fake_world(config, config.machine.num_ranks, rank)
    spec = _spec(config)
    spec.model.update_from_config(config=config)
    model, counts = meta_model(spec, config.training.seq_len)
    options = parallelize_options(config, parallel_dims)
    if not parallel_dims.pp_enabled:
        return counts, [spec.parallelize_fn(model, **options)]
    _, parts, _, _ = spec.pipelining_fn(
        model,
        device=torch.device("meta"),
        model_config=spec.model,
        parallelize_fn=spec.parallelize_fn,
        loss_fn=config.loss.build(compile_config=config.compile),
        **options,
    )
    return counts, parts


def _spec(config):
    """The model as trained; float8 is emulated, since this machine may lack it."""
    emulated = dataclasses.replace(config.float8, emulate=True)
    eager = dataclasses.replace(config.compile, enable=False, enable_async_tensor_parallel=False)
    policy = config.activation_checkpoint if not config.compile.enable else None
    changed = dataclasses.replace(config, float8=emulated, compile=eager, activation_checkpoint=policy)
    return trained(changed).model_spec


def _local_size(part: torch.nn.Module, *, tied: bool) -> int:
    """Elements of a part's parameters on this rank."""
    # TorchTitan ties the weights again when it initialises them; on the meta device they are two.
    shared = "tok_embeddings.weight" if tied else None
    local = [
        parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for name, parameter in part.named_parameters()
        if name != shared
    ]
    return sum(parameter.numel() for parameter in local)
