"""The training step never waits for the device, so that CUDA graphs can replay it.

The model, the loss and their backward are traced on the meta device: tensors without values.
"""

import pytest
import torch
from helpers import make_config
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.models.common.attention import FlexAttention

from nitp_titan.config.trained import trained
from nitp_titan.objectives.distances import nitp_loss_sum
from nitp_titan.objectives.loss import AuxiliaryLoss

DEVICE = "meta"


class HostSync(Exception):
    pass


# Operators that hand a value, or a shape that depends on values, to the host.
_SYNCHRONISING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}


class _NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        masked = function is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        leaves = function is torch.ops.aten._to_copy.default and kwargs.get("device") not in (None, args[0].device)
        copies = function is torch.ops.aten.copy_.default and args[0].device != args[1].device and args[2:] != (True,)
        if function in _SYNCHRONISING or masked or leaves or copies:
            raise HostSync(function)
        return function(*args, **kwargs)


class _Attention(FlexAttention):
    """Plain causal attention: the mask's kernels are TorchTitan's and are not under test."""

    def forward(self, q, k, v, *, scale=None, enable_gqa=False, **kwargs):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        return out.transpose(1, 2)


def _trace(config) -> torch.Tensor:
    """Forward, loss, backward and the metrics' buffer of two micro-batches."""
    spec = trained(config).model_spec
    spec.model.update_from_config(config=config)
    settings = config.loss
    with torch.device(DEVICE):
        model = spec.model.build()
        for layer in model.layers.values():
            layer.attention.inner_attention.forward = _Attention.forward.__get__(layer.attention.inner_attention)
        model._skip_lm_head = True
        loss = AuxiliaryLoss.Config(num_chunks=settings.num_chunks, loss_fn=settings.loss_fn, nitp=config.nitp).build()
        loss.set_lm_head(model.lm_head)
        loss.attach(model.nitp.projector, num_microbatches=2, device=torch.device(DEVICE))
        loss.begin_step(weight=1.0, num_terms=torch.ones((), dtype=torch.int64))
        tokens = torch.zeros(2, config.training.seq_len, dtype=torch.int64)
        valid_tokens = torch.ones((), dtype=torch.int64)
        with _NoHostSync():
            for _ in range(2):
                pred = model(tokens, positions=tokens)
                total, _ = loss(pred, tokens, valid_tokens)
                total.backward()
            return loss.losses.sum(0)


VARIANTS = {
    "default": {},
    "mse": {"loss": "mse"},
    "smooth L1": {"loss": "smooth_l1"},
    "KL": {"loss": "kl"},
    "no stop-gradient": {"stop_gradient": False},
    "no projector": {"projector": "none"},
    "same position": {"temporal_shift": 0},
    "regularizer": {"objective": "cosine_regularizer"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_loss_ask_for_no_value_of_the_device(assets, tmp_path, variant):
    assert _trace(make_config(tmp_path, nitp=VARIANTS[variant])).device == torch.device(DEVICE)


def _with_item(*args, **kwargs):
    loss = nitp_loss_sum(*args, **kwargs)
    return loss if loss.item() > 0 else -loss


def _with_copy(*args, **kwargs):
    loss = nitp_loss_sum(*args, **kwargs)
    return loss * loss.detach().cpu()


def _with_selection(prediction, target, valid, loss):
    return nitp_loss_sum(prediction[valid], target[valid], valid[valid], loss)


@pytest.mark.parametrize("function", [_with_item, _with_copy, _with_selection])
def test_a_loss_that_waits_for_the_device_is_found(assets, tmp_path, monkeypatch, function):
    monkeypatch.setattr("nitp_titan.objectives.nitp.nitp_loss_sum", function)
    with pytest.raises(HostSync):
        _trace(make_config(tmp_path))


def test_counters_stay_where_they_are_from_step_to_step(assets, tmp_path):
    """A captured graph reads and writes the addresses that it has seen."""
    config = make_config(tmp_path, training={"steps": 3})
    trainer = config.build()
    batches = trainer.batch_generator(trainer.dataloader)
    loss, seen = trainer.loss_fn, []
    for step in range(1, 4):
        trainer.step = step
        trainer.train_step(batches)
        seen.append([tensor.data_ptr() for tensor in (loss.losses, loss.weight, loss.num_terms)])
    trainer.close()
    assert seen[0] == seen[1] == seen[2]


@pytest.fixture
def watched(assets, tmp_path):
    """A trainer after two steps."""
    trainer = make_config(tmp_path, metrics={"log_freq": 100}, training={"steps": 3}).build()
    batches = trainer.batch_generator(trainer.dataloader)
    for step in (1, 2):
        trainer.step = step
        trainer.train_step(batches)
    yield trainer
    trainer.close()


def test_the_guard_reads_one_tensor_once_a_step(watched, monkeypatch):
    """Whatever the bound on skipped steps and whoever logs the step."""
    bad_steps, read = watched.bad_steps, []
    monkeypatch.setattr(bad_steps, "measure", lambda: torch.zeros(7 + len(bad_steps.parameters)))
    monkeypatch.setattr(bad_steps, "_judge", lambda step, stats: read.append((step, len(stats))))
    bad_steps.losses = torch.zeros(2)
    with _NoHostSync():
        for step in (3, 4):
            bad_steps.observe(step, torch.ones(()))
            assert len(read) == step - 3
            bad_steps.observe(step, torch.ones(()))
    assert read == [(3, 7 + len(bad_steps.parameters)), (4, 7 + len(bad_steps.parameters))]


def test_the_figures_of_the_guard_stay_on_the_device(watched):
    bad_steps = watched.bad_steps
    for name in ("losses", "backward", "loss_stats"):
        setattr(bad_steps, name, getattr(bad_steps, name).to(DEVICE))
    bad_steps.device, bad_steps._shares = torch.device(DEVICE), None
    bad_steps.parameters = {"weight": torch.nn.Parameter(torch.ones(4, device=DEVICE))}
    bad_steps.parameters["weight"].grad = torch.ones(4, device=DEVICE)
    with _NoHostSync():
        assert bad_steps.measure().device == torch.device(DEVICE)
    with pytest.raises(HostSync), _NoHostSync():
        bad_steps.measure().isfinite().all().item()
