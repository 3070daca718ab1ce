"""Cost of NITP at full size, counted on fake tensors: no weights are allocated and nothing is computed.

A case is one step of one variant on one rank of a fake world: forward, loss and backward of a micro-batch of one
sequence, in bfloat16 with float32 reductions, eager. Every case runs in a process of its own: TorchTitan's meshes are
globals.

Experts need nothing special without expert parallelism: a token has ``top_k`` of them whatever the router says, so all
shapes are known, and grouped products cost the same however tokens are spread. With expert parallelism the all-to-all's
sizes depend on data; fake tensors have none, so such layouts are not counted.
"""

import dataclasses
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper
from torchtitan.config import CommConfig, OverrideConfig
from torchtitan.config.override import apply_overrides
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.common.decoder import Decoder
from torchtitan.tools.logging import logger

from nitp_titan.config import recipe
from nitp_titan.config.parallelism import check_parallelism, data_parallel_ranks
from nitp_titan.config.trained import trained
from nitp_titan.machine import cpu
from nitp_titan.models import llama3
from nitp_titan.sizing import kernels
from nitp_titan.sizing.model_size import count_model, Counts
from nitp_titan.sizing.trace import Cost, preset_gradients, trace
from nitp_titan.training.trainer import load_config, NITPTrainer
from overhead.variants import variant_configs

CHECKPOINTING = {"none": None, "selective": kernels.KernelSelectiveAC.Config(), "full": FullAC.Config()}
# float32 parameter, gradient and the two moments of AdamW.
_BYTES_OF_STATES = 4 * 4


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
class Result:
    """What a case costs one rank."""

    case: Case

    cost: Cost
    """Of one sequence, or of this rank's part of it. Its peak holds gathered parameters and gradients on their way."""

    state_bytes: int
    """Parameters, gradients and moments of AdamW, float32."""

    counts: Counts

    paper_flops: int
    """App. G's formula for the backbone, per token."""

    paper_nitp_flops: int
    seconds: float


def count_all(cases: Iterable[Case], log: Callable[[str], None] = print) -> Iterator[Result]:
    """Count cases, two at a time, each in a process of its own.

    Args:
        cases: any number.
        log: takes a line about every case when it is done.

    Yields:
        In the order of ``cases``.

    Raises:
        RuntimeError: in a process that has a process group, which the fake worlds would inherit.
    """
    if dist.is_initialized():
        raise RuntimeError("full_size.count_all needs a process without a torch.distributed process group.")
    cases = list(cases)
    cpu.install()
    # Forked after the imports, which take longer than a case.
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for done, result in enumerate(pool.imap(count, cases, chunksize=1), 1):
            case = result.case
            log(
                f"{done} of {len(cases)}: {case.recipe} {case.variant}, {case.seq_len} tokens on {case.num_ranks} "
                f"ranks, checkpointing {case.checkpointing} ({result.seconds:.0f} s)"
            )
            yield result


def count(case: Case) -> Result:
    """Count one case; the process group of the fake world stays behind."""
    start = time.perf_counter()
    cpu.install()
    # What a run would warn of is no news here.
    logger.setLevel(logging.ERROR)
    config = _config(case)
    parallel_dims = _fake_world(config, case.num_ranks)
    model, loss, counts = _build(config, parallel_dims)
    with warnings.catch_warnings(), _allocated(model, config):
        warnings.filterwarnings("ignore", "In CPU autocast")
        cost = trace(_step(config, parallel_dims, model, loss))
        states = _BYTES_OF_STATES * sum(parameter.to_local().numel() for parameter in model.parameters())
    return Result(
        case, cost, states, counts, *paper_formula(config.model_spec.model), seconds=time.perf_counter() - start
    )


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


def _fake_world(config: NITPTrainer.Config, num_ranks: int) -> ParallelDims:
    os.environ.update(NGPU=str(num_ranks), RANK="0", LOCAL_RANK="0")
    dist_utils.init_distributed(CommConfig(mode="fake_backend"))
    parallel_dims = ParallelDims.from_config(config.parallelism, num_ranks)
    parallel_dims.build_mesh()
    dist_utils.set_spmd_backend(config.parallelism.spmd_backend)
    return parallel_dims


def _build(config: NITPTrainer.Config, parallel_dims: ParallelDims) -> tuple[Decoder, BaseLoss, Counts]:
    """As TorchTitan's trainer: a model on the meta device, parallelized, and its loss."""
    with torch.device("meta"):
        model = config.model_spec.model.build()
    counts = count_model(model, config.training.seq_len)
    model = config.model_spec.parallelize_fn(
        model,
        parallel_dims=parallel_dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=config.activation_checkpoint,
        dump_folder=config.dump_folder,
    )
    loss = config.loss.build(compile_config=config.compile)
    if isinstance(loss, ChunkedLossWrapper):
        model._skip_lm_head = True
        loss.set_lm_head(model.lm_head)
    return model, loss, counts


@contextmanager
def _allocated(model: Decoder, config: NITPTrainer.Config) -> Iterator[None]:
    """A context of fake tensors in which a model has weights and gradients."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        if model.enable_weight_tying:
            # As Decoder.init_states.
            model.tok_embeddings.weight = model.lm_head.weight
        preset_gradients(model)
        yield


def _step(
    config: NITPTrainer.Config, parallel_dims: ParallelDims, model: nn.Module, loss_fn: BaseLoss
) -> Callable[[], None]:
    """Forward, loss and backward of one micro-batch, as `Trainer._forward_backward_body`."""
    tokens = torch.zeros(1, config.training.seq_len // config.parallelism.context_parallel_degree, dtype=torch.int64)
    num_tokens = torch.ones((), dtype=torch.int64)
    context = dist_utils.get_spmd_context(parallel_dims=parallel_dims)
    if config.nitp.enabled:
        loss_fn.attach(model.nitp.projector, num_microbatches=1, device=tokens.device)
        loss_fn.begin_step(weight=config.nitp.weight, num_terms=num_tokens)

    def step() -> None:
        with context():
            pred = model(tokens, positions=tokens)
            loss, _ = loss_fn(pred, tokens, num_tokens, positions=tokens)
            del pred
            loss.backward()

    return step


def paper_formula(model: Decoder.Config) -> tuple[int, int]:
    """FLOPs per token of backbone and NITP, App. G word for word: L (18 d^2 + 18 k d d_e) + 6 V d and 72 d^2 + 18 d.

    The last layer stands for all; k counts the shared expert, and k d_e is the width of a dense model's feed-forward.
    """
    last, dim = model.layers[-1], model.dim
    if last.moe is None:
        width = last.feed_forward.w1.out_features
    else:
        width = (last.moe.router.top_k + 1) * last.moe.routed_experts.inner_experts.hidden_dim
    backbone = len(model.layers) * (18 * dim**2 + 18 * dim * width) + 6 * model.vocab_size * dim
    return backbone, 72 * dim**2 + 18 * dim
