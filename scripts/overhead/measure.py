"""Step times of several trainings of one process, which take turns step by step.

Whatever disturbs the machine then disturbs all of them alike; ratios of neighbouring steps give the cost of a variant.
"""

import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.loss import ChunkedLossWrapper

from nitp_titan.difference import bootstrap_interval
from nitp_titan.sizing import trace
from nitp_titan.training.trainer import NITPTrainer

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def measure(
    configs: dict[str, NITPTrainer.Config],
    *,
    num_rounds: int,
    num_warmup: int,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Step times and memory of some variants, on one rank. The first variant is the baseline.

    Args:
        configs: from `variants.variant_configs`.
        num_rounds: steps of every variant that count.
        num_warmup: steps of every variant before, which do not.
        log: takes lines of progress.

    Returns:
        ``{"tokens_per_step", "rounds", "variants": {name: stats}}``; see `_stats`.
    """
    with _trainers(configs, num_rounds + num_warmup, log) as trainers:
        times = step_times(trainers, num_rounds=num_rounds, num_warmup=num_warmup, log=log)
        costs = {name: _traced(trainer) for name, trainer in trainers.items()}
        some = next(iter(trainers.values())).config.training
        num_tokens = some.global_batch_size * some.seq_len
        stats = {name: _stats(name, trainer, times, costs, num_tokens=num_tokens) for name, trainer in trainers.items()}
    return {"tokens_per_step": num_tokens, "rounds": num_rounds, "variants": stats}


def peak_bytes(configs: dict[str, NITPTrainer.Config]) -> dict[str, int]:
    """Peak of the bytes of activations and transients in forward and backward, by variant; see `_Traced`."""
    with _trainers(configs, 1, lambda line: None) as trainers:
        return {name: _traced(trainer).peak_bytes for name, trainer in trainers.items()}


@contextmanager
def _trainers(
    configs: dict[str, NITPTrainer.Config], num_steps: int, log: Callable[[str], None]
) -> Iterator[dict[str, NITPTrainer]]:
    with tempfile.TemporaryDirectory() as scratch:
        trainers = {}
        for name, config in configs.items():
            log(f"building {name}")
            trainers[name] = _for_timing(config, f"{scratch}/{name}", num_steps).build()
            # The first step is logged, whatever the interval.
            trainers[name].step = 1
        yield trainers
        for trainer in trainers.values():
            trainer.close()
        dist.destroy_process_group()


def _for_timing(config: NITPTrainer.Config, folder: str, num_steps: int) -> NITPTrainer.Config:
    return dataclasses.replace(
        config,
        dump_folder=folder,
        training=dataclasses.replace(config.training, steps=max(config.training.steps, num_steps + 4)),
        metrics=dataclasses.replace(config.metrics, log_freq=10 * num_steps + 100),
    )


def step_times(
    trainers: dict[str, NITPTrainer],
    *,
    num_rounds: int,
    num_warmup: int,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, list[float]]:
    """Seconds of every optimizer step of every variant; data loading is not in it.

    All variants train the same batches. In each round every variant takes a step, in a new random order.
    """
    some = next(iter(trainers.values()))
    batches = some.batch_generator(some.dataloader)
    order, shuffle = list(trainers), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    started = time.perf_counter()
    for done in range(num_warmup + num_rounds):
        step_batches = _next_step(some, batches)
        shuffle.shuffle(order)
        for name in order:
            seconds = _step_time(trainers[name], step_batches)
            if done >= num_warmup:
                times[name].append(seconds)
        left = (time.perf_counter() - started) / (done + 1) * (num_warmup + num_rounds - done - 1)
        log(f"round {done + 1} of {num_warmup + num_rounds}, {left:.0f} s left")
    return times


def _next_step(trainer: NITPTrainer, batches) -> list[Batch]:
    return list(islice(batches, trainer.gradient_accumulation_steps * trainer.num_pipeline_parallel_microbatches))


def _step_time(trainer: NITPTrainer, batches: list[Batch]) -> float:
    trainer.step += 1
    _wait(trainer.device)
    start = time.perf_counter()
    trainer.train_step(iter(_own(batches)))
    _wait(trainer.device)
    return time.perf_counter() - start


def _own(batches: list[Batch]) -> list[Batch]:
    """The step writes the inputs' device copies into the batch."""
    return [(dict(inputs), labels) for inputs, labels in batches]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclasses.dataclass(frozen=True)
class _Traced:
    """Of one step, counted; None where compiled code hides its operators."""

    step: trace.Cost | None
    peak_bytes: int
    """Peak of the bytes alive above what was there before forward and backward: activations and transients."""


def _traced(trainer: NITPTrainer) -> _Traced:
    batches = trainer.batch_generator(trainer.dataloader)
    one = _next_step(trainer, batches)
    for part in trainer.model_parts:
        trace.preset_gradients(part)
    if trainer.device.type != "cpu":
        return _Traced(None, _device_peak(trainer, one))
    inputs, labels = _own(one)[0]
    num_tokens = torch.tensor(labels.numel())
    passes = trace.trace(
        lambda: trainer.forward_backward_step(input_dict=inputs, labels=labels, global_valid_tokens=num_tokens)
    )
    trainer.step += 1
    return _Traced(trace.trace(lambda: trainer.train_step(iter(_own(one)))), passes.peak_bytes)


def _device_peak(trainer: NITPTrainer, batches: list[Batch]) -> int:
    """From the allocator, over a whole step outside of a CUDA graph, whose replay allocates nothing."""
    _wait(trainer.device)
    before = torch.accelerator.memory_allocated(trainer.device)
    torch.accelerator.reset_peak_memory_stats(trainer.device)
    trainer.step += 1
    with trainer.without_cuda_graph():
        trainer.train_step(iter(_own(batches)))
    _wait(trainer.device)
    return torch.accelerator.max_memory_allocated(trainer.device) - before


def _stats(
    name: str,
    trainer: NITPTrainer,
    times: dict[str, list[float]],
    costs: dict[str, _Traced],
    *,
    num_tokens: int,
) -> dict[str, Any]:
    """Of one variant; all but the times of the baseline are beside it.

    Returns:
        ``seconds``: median and quartiles of a step; ``ratio``: median, quartiles and 95% bootstrap interval of the
        median of the ratios of its steps to those of the baseline in the same round; ``tokens_per_second``; ``mfu`` by
        TorchTitan's count, None on a CPU; counted ``matmul_flops`` and ``attention_flops`` per token; ``peak_bytes``;
        ``chunks`` of the loss.
    """
    baseline = next(iter(times))
    ratios = [ours / theirs for ours, theirs in zip(times[name], times[baseline])]
    cost, seconds = costs[name].step, statistics.median(times[name])
    loss, metrics = trainer.loss_fn, trainer.metrics_processor
    peak_flops = metrics.gpu_peak_flops if trainer.device.type != "cpu" else None
    return {
        "seconds": {"median": seconds, "quartiles": _quartiles(times[name])},
        "ratio": {
            "median": statistics.median(ratios),
            "quartiles": _quartiles(ratios),
            "interval": bootstrap_interval(ratios, statistics.median),
        },
        "tokens_per_second": num_tokens / seconds,
        "mfu": peak_flops and metrics.num_flops_per_token * num_tokens / seconds / peak_flops,
        "matmul_flops": cost and cost.matmul_flops / num_tokens,
        "attention_flops": cost and cost.attention_flops / num_tokens,
        "peak_bytes": costs[name].peak_bytes,
        "chunks": loss.num_chunks if isinstance(loss, ChunkedLossWrapper) else 1,
    }


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, high
