"""What the model card says of the learning-rate schedule is what was trained."""

import re

import pytest
import torch

from nitp_titan.hf.card import schedule
from nitp_titan.lr_scheduler import WSDSchedulers

STEPS = 100


def _rates(config) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = config.build(optimizers=[optimizer], training_steps=STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedulers.step()
    return rates


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "warm-up of 10 steps, linear decay over everything after it (90 steps)"),
        ({"decay_ratio": 0.2}, "warm-up of 10 steps, linear decay over the last 20 of 100 steps"),
        ({"decay_ratio": 0.95}, "warm-up of 10 steps, linear decay over everything after it (90 steps)"),
        ({"decay_ratio": 0.0}, "warm-up of 10 steps, then constant"),
        (
            {"decay_ratio": 0.2, "decay_type": "cosine", "min_lr_factor": 0.1},
            "warm-up of 10 steps, cosine decay over the last 20 of 100 steps to 0.1 of the rate",
        ),
    ],
)
def test_the_schedule_in_words_is_that_of_the_rates(settings, text):
    config = WSDSchedulers.Config(warmup_steps=10, **settings)
    assert schedule(config, STEPS) == text
    falling = sum(later < earlier for earlier, later in zip(_rates(config), _rates(config)[1:]))
    stated = re.search(r"last (\d+) of|\((\d+) steps\)", text)
    # TorchTitan puts a virtual step behind the last one.
    assert falling == (int(stated[1] or stated[2]) - 1 if stated else 0)


def test_a_schedule_of_another_length_than_the_run_says_so():
    config = WSDSchedulers.Config(warmup_steps=10, total_steps=2_000, decay_ratio=0.2)
    assert schedule(config, STEPS) == "warm-up of 10 steps, linear decay over the last 400 of 2,000 steps"
