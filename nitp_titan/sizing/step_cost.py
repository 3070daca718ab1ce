"""Cost of a training step at full size, counted on fake tensors: no weights are allocated, nothing is computed.

A step is forward, loss and backward of a micro-batch of one sequence on one rank of a fake world.

Experts need nothing special without expert parallelism: every token has ``top_k`` of them whatever the router decides,
so all shapes are known, and grouped products cost the same however tokens are spread. With expert parallelism the sizes
of the all-to-all depend on data, which fake tensors do not have, so such layouts are not counted.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.common.decoder import Decoder

from nitp_titan.sizing.fake_world import fake_world, meta_model, parallelize_options
from nitp_titan.sizing.model_size import Counts
from nitp_titan.sizing.trace import Cost, preset_gradients, trace

# float32 parameter, gradient and the two moments of AdamW.
_BYTES_OF_STATES = 4 * 4


@dataclass(frozen=True)
class StepCost:
    """Cost of a step for one rank."""

    cost: Cost
    """Of one sequence, or of this rank's part of it. Its peak holds gathered parameters and gradients on their way."""

    state_bytes: int
    """Parameters, gradients and moments of AdamW, float32."""

    counts: Counts


def step_cost(config, num_ranks: int) -> StepCost:
    """Count a step; the process group of the fake world stays behind.

    Args:
        config: a ``NITPTrainer.Config`` with the model and the loss to be trained (`config.trained`), updated for its
            settings (``update_from_config``).
        num_ranks: of the fake world.
    """
    parallel_dims = fake_world(config, num_ranks)
    model, counts = meta_model(config.model_spec, config.training.seq_len)
    model = config.model_spec.parallelize_fn(model, **parallelize_options(config, parallel_dims))
    loss = config.loss.build(compile_config=config.compile)
    if isinstance(loss, ChunkedLossWrapper):
        model._skip_lm_head = True
        loss.set_lm_head(model.lm_head)
    with warnings.catch_warnings(), _allocated(model):
        warnings.filterwarnings("ignore", "In CPU autocast")
        cost = trace(_step(config, parallel_dims, model, loss))
        states = _BYTES_OF_STATES * sum(parameter.to_local().numel() for parameter in model.parameters())
    return StepCost(cost, states, counts)


@contextmanager
def _allocated(model: Decoder) -> Iterator[None]:
    """A context of fake tensors in which a model has weights and gradients."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        if model.enable_weight_tying:
            # As Decoder.init_states.
            model.tok_embeddings.weight = model.lm_head.weight
        preset_gradients(model)
        yield


def _step(config, parallel_dims: ParallelDims, model: nn.Module, loss_fn: BaseLoss) -> Callable[[], None]:
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
