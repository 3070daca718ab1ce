"""What the model card says of the schedule is what was trained, and its stats are of the steps that it names."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from nitp_titan.export.card import measured, schedule
from nitp_titan.training.lr_scheduler import WSDSchedulers

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


def test_every_figure_is_of_the_step_that_the_card_names(tmp_path):
    """The last of its kind up to the checkpoint, and not one line for all of them."""
    files = {
        "metrics": [
            {"step": 1, "ntp_loss": 8.0, "tokens": 100, "effective_rank": 3.0},
            {"step": 8, "ntp_loss": 7.0, "tokens": 800},
            {"step": 9, "cosine": -0.00001},
            {"step": 10, "ntp_loss": 6.0, "tokens": 1000, "effective_rank": 5.0},
        ],
        "validation": [{"step": 4, "ntp_loss": 7.5}, {"step": 8, "skipped": "the hub was away"}],
    }
    for name, records in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert measured(SimpleNamespace(run_folder=tmp_path, step=9)) == {
        "tokens, step 8": "800",
        "NTP loss, training batch, step 8": "7.0000",
        "NTP loss, validation, step 4": "7.5000",
        "effective rank of the last hidden states, step 1": "3.0000",
        "average cosine of the last hidden states, step 9": "0.0000",
    }
