"""Warmup-stable-decay: the exponential decay against its closed form, all else TorchTitan's own."""

import math

import pytest
import torch
from torchtitan.components.optimizer import LRSchedulersContainer

from nitp_titan.errors import UserError
from nitp_titan.training.lr_scheduler import WSDSchedulers

LR, STEPS = 2e-3, 100


def _rates(config, steps=STEPS) -> list[float]:
    """Learning rate of every step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedulers = config.build(optimizers=[optimizer], training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedulers.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("end", [0.1, 0.01])
def test_wsd_exp_follows_its_closed_form(warmup, end):
    rates = _rates(
        WSDSchedulers.Config(warmup_steps=warmup, decay_ratio=0.2, decay_type="exponential", min_lr_factor=end)
    )
    decay_steps = round(0.2 * STEPS)
    # TorchTitan puts one virtual step behind the last, so the last step is one short of the end.
    for step, rate in enumerate(rates, start=1):
        if step <= warmup:
            expected = LR * step / warmup
        elif step <= STEPS - decay_steps + 1:
            expected = LR
        else:
            expected = LR * math.exp(math.log(end) * (step - (STEPS - decay_steps + 1)) / decay_steps)
        assert rate == pytest.approx(expected, rel=1e-12), step
    assert rates[-1] == pytest.approx(LR * end ** ((decay_steps - 1) / decay_steps))


@pytest.mark.parametrize("decay_type", ["linear", "sqrt", "cosine"])
def test_every_other_decay_is_torchtitans_own(decay_type):
    settings = dict(warmup_steps=7, decay_ratio=0.3, decay_type=decay_type, min_lr_factor=0.05)
    assert _rates(WSDSchedulers.Config(**settings)) == _rates(LRSchedulersContainer.Config(**settings))


def test_a_resumed_schedule_continues_where_it_was():
    config = WSDSchedulers.Config(warmup_steps=5, decay_ratio=0.5, decay_type="exponential", min_lr_factor=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedulers = config.build(optimizers=[optimizer], training_steps=STEPS)
    schedulers.load_state_dict({"last_epoch": 79})
    assert list(schedulers.get_metrics().values()) == [pytest.approx(_rates(config)[79])]


def test_an_exponential_decay_to_nothing_is_refused():
    with pytest.raises(
        UserError, match=r"\[lr_scheduler\] min_lr_factor = 0.0, but an exponential decay never reaches 0"
    ):
        WSDSchedulers.Config(decay_type="exponential")
