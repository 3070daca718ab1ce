"""Flags: what the messages call a value is taken, and what is wrong is one line with status 1."""

import pytest
from outcome import is_one_line

from nitp_titan.runs.preflight import preflight
from nitp_titan.training import trainer


@pytest.fixture
def start(entry, machine, monkeypatch):
    """The entry point with flags: how it ends, and the config that it would train."""
    configs = []

    def remember(config):
        configs.append(config)
        return preflight(config)

    monkeypatch.setattr(trainer, "preflight", remember)

    def run(*flags):
        end, _ = entry("--recipe", "debug/nitp_debug", "--train-config", machine(), *flags)
        return end, configs[-1] if configs else None

    return run


def test_values_are_called_as_the_messages_call_them(start):
    optional = ["--bad_steps.skip_above", "none", "--lr_scheduler.decay_ratio", "None", "--nitp.projector", "none"]
    fields = ["--dataloader.text_field", "question", "answer", "--optimizer.weight-decay", "0.25"]
    end, config = start(*optional, *fields)
    assert config is not None, end
    assert config.bad_steps.skip_above is None and config.lr_scheduler.decay_ratio is None
    assert config.nitp.projector == "none" and config.dataloader.text_field == ["question", "answer"]
    assert config.optimizer.param_groups[0].optimizer_kwargs["weight_decay"] == 0.25


def test_one_text_field_stays_one(start):
    assert start("--dataloader.text_field", "body")[1].dataloader.text_field == "body"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nitp.wieght", "1"], ["--nitp.wieght", "--nitp.weight"]),
        (["--nitp.weight", "much"], ["--nitp.weight", "much"]),
        (["--nitp.objective", "nipt"], ["--nitp.objective", "nipt", "cosine_regularizer"]),
        (["--nitp.weight"], ["--nitp.weight"]),
        (["--recipe"], ["--recipe"]),
        (["--checkpoint.enable", "maybe"], ["maybe"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_flag_is_one_line(start, flags, said):
    end, config = start(*flags)
    assert config is None and is_one_line(end), end
    assert all(text in end for text in said), end
