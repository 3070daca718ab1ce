"""Models at full size on the ranks of a fake world: nothing is allocated and nothing is sent."""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torchtitan.config import CommConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger

from nitp_titan.machine import cpu
from nitp_titan.sizing.model_size import count_model, Counts

Case = TypeVar("Case")
Result = TypeVar("Result")


def each_in_a_process(count: Callable[[Case], Result], cases: Iterable[Case]) -> Iterator[Result]:
    """Results of a function in the order of its cases, two at a time.

    Every case has a process of its own, since TorchTitan's meshes are globals.

    Raises:
        RuntimeError: in a process that has a process group, which the fake worlds would inherit.
    """
    if dist.is_initialized():
        raise RuntimeError("a fake world needs a process without a torch.distributed process group.")
    cpu.install()
    # Warnings of TorchTitan are about training.
    logger.setLevel(logging.ERROR)
    return _results(count, cases)


def _results(count: Callable[[Case], Result], cases: Iterable[Case]) -> Iterator[Result]:
    # Forked after the imports, which take longer than a case.
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        yield from pool.imap(count, cases, chunksize=1)


def fake_world(config, num_ranks: int, rank: int = 0) -> ParallelDims:
    """Meshes of a ``Trainer.Config`` over the ranks of a fake process group, in which this process is one rank."""
    os.environ.update(NGPU=str(num_ranks), RANK=str(rank), LOCAL_RANK="0")
    dist_utils.init_distributed(CommConfig(mode="fake_backend"))
    parallel_dims = ParallelDims.from_config(config.parallelism, num_ranks)
    parallel_dims.build_mesh()
    dist_utils.set_spmd_backend(config.parallelism.spmd_backend)
    return parallel_dims


def meta_model(spec: ModelSpec, seq_len: int) -> tuple[Decoder, Counts]:
    """A model on the meta device, not parallelized, and its counts."""
    with torch.device("meta"):
        model = spec.model.build()
    return model, count_model(model, seq_len)


def parallelize_options(config, parallel_dims: ParallelDims) -> dict[str, Any]:
    """Arguments of a family's ``parallelize_fn`` and ``pipelining_fn``, as TorchTitan's trainer gives them."""
    return {
        "parallel_dims": parallel_dims,
        "training": config.training,
        "parallelism": config.parallelism,
        "compile_config": config.compile,
        "ac_config": config.activation_checkpoint,
        "dump_folder": config.dump_folder,
    }
