"""Tokens and passwords are written nowhere."""

import dataclasses

import pytest
from helpers import make_config

from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.mixtures import TextSource
from nitp_titan.errors import UserError
from nitp_titan.machine.credentials import redact
from nitp_titan.machine.exits import exit_with
from nitp_titan.runs import provenance

SECRET = "hf_0123456789abcdef"


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "S3_SECRET"]
)
def test_the_value_of_a_secret_variable_is_hidden_wherever_it_stands(monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    assert redact(f"--path=x{SECRET}y {SECRET}") == "--path=x***y ***"
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "x", f"--token={SECRET}"])
    assert provenance.command() == ["python", "-m", "x", "--token=***"]
    with pytest.raises(SystemExit, match="^error: no such file 'x\\*\\*\\*'$"):
        exit_with(UserError(f"no such file 'x{SECRET}'"))


def test_other_variables_and_short_values_are_left_alone(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/user/token")
    monkeypatch.setenv("HF_TOKEN", "x")
    text = "parallelism of /home/user/token x"
    assert redact(text) == text


def test_the_user_of_a_url_is_hidden_and_its_path_is_not():
    assert redact("https://user:secret@host/a@b") == "https://***@host/a@b"
    assert redact("https://token@host and s3://bucket/a@b") == "https://***@host and s3://bucket/a@b"


@pytest.mark.parametrize(
    ("value", "what"),
    [("https://me:word@host/x.jsonl", "a user or password in a URL"), (f"/data/{SECRET}", "the value of HF_TOKEN")],
)
def test_a_setting_that_holds_a_secret_is_refused_without_saying_it(assets, tmp_path, monkeypatch, value, what):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    loader = TextDataLoader.Config(sources=[TextSource(dataset="json", dataset_path=value)])
    for changes, place in (
        ({"dataloader": loader}, "[dataloader] sources[0].dataset_path"),
        ({"hf_assets_path": value}, "hf_assets_path"),
    ):
        with pytest.raises(UserError) as refused:
            dataclasses.replace(make_config(tmp_path), **changes)
        text = str(refused.value)
        assert text.startswith(f"{place} holds {what}. ") and SECRET not in text and "word@" not in text
