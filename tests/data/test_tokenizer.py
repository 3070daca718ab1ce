"""One tokenizer for all commands: nothing but the text decides about its tokens, and every document ends."""

import json
import shutil

import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from nitp_titan.data import hub
from nitp_titan.data.tokenizer import (
    CachedTokenizer,
    load_tokenizer,
    TextTokenizer,
    UnfitTokenizer,
)
from nitp_titan.data.tokens.shards import load_tokenizer as tokenizer_of_tokens
from nitp_titan.errors import UserError
from nitp_titan.evaluation import perplexity
from nitp_titan.evaluation.geometry import tokenized
from nitp_titan.evaluation.pretrained import load_pretrained

TEXT = "def f(x):\n    return x  # forty tokens or so, which are more than eight of them\n"
BOS, EOS = "<|bos|>", "<|eos|>"
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "<|eos|>",
}
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


def _changed(assets, folder, config=None, **changes):
    """The tokenizer of the assets in a folder, with other entries in its files."""
    folder.mkdir(exist_ok=True)
    tokenizer = json.loads((assets / "tokenizer.json").read_text()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(assets / "tokenizer_config.json", folder)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _model(folder):
    from geometry_of_models import make

    make("gpt2").save_pretrained(folder)
    return load_pretrained(str(folder))[1]


DOORS = {
    "training": lambda folder: CachedTokenizer.Config().build(tokenizer_path=str(folder)),
    "tokenizing": lambda folder: tokenizer_of_tokens(str(folder)),
    "evaluation": lambda folder: perplexity.RecordingTokenizer(str(folder)),
    "export": lambda folder: TextTokenizer(tokenizer_path=str(folder)),
}


@pytest.mark.parametrize("changes", [{"truncation": TRUNCATION}, {"padding": PADDING}], ids=["truncation", "padding"])
def test_truncation_and_padding_of_the_file_are_off_for_everyone(assets, tmp_path, changes):
    expected = HuggingFaceTokenizer(tokenizer_path=str(assets)).encode(TEXT, add_bos=True, add_eos=True)
    folder = _changed(assets, tmp_path / "changed", **changes)
    assert HuggingFaceTokenizer(tokenizer_path=str(folder)).encode(TEXT, add_bos=True, add_eos=True) != expected
    for name, load in DOORS.items():
        assert load(folder).encode(TEXT, add_bos=True, add_eos=True) == expected, name
    tokenizer = _model(folder)
    assert [ids.tolist() for ids in tokenized([TEXT], tokenizer, 99)] == [expected[:-1]]
    assert tokenizer.backend_tokenizer.truncation is None and tokenizer.backend_tokenizer.padding is None


def test_the_string_of_a_special_token_is_text(assets, tmp_path):
    text = "a<|eos|>b<|bos|>"
    assert 1 in HuggingFaceTokenizer(tokenizer_path=str(assets)).encode(text)
    folder = _changed(assets, tmp_path / "model")
    for name, load in DOORS.items():
        tokenizer = load(folder)
        ids = tokenizer.encode(text, add_bos=True, add_eos=True)
        assert [index for index, token in enumerate(ids) if token < 2] == [0, len(ids) - 1], name
        assert tokenizer.decode(ids[1:-1]) == text, name
    (row,) = tokenized([text], _model(folder), 99)
    assert row.tolist() == ids[:-1]


def _template(*parts):
    kinds = [("Sequence", "A") if part is None else ("SpecialToken", part) for part in parts]
    pieces = [{kind: {"id": name, "type_id": 0}} for kind, name in kinds]
    special = {part: {"id": part, "ids": [(BOS, EOS).index(part)], "tokens": [part]} for part in parts if part}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [*pieces, *pieces], "special_tokens": special}


@pytest.mark.parametrize(
    ("template", "config", "begin", "end"),
    [
        (None, {"bos_token": BOS, "eos_token": EOS}, [0], [1]),
        (_template(BOS, None), {"bos_token": BOS, "eos_token": EOS}, [0], [1]),
        (_template(None, EOS), {"bos_token": BOS, "eos_token": EOS}, [0], [1]),
        (_template(BOS, None, EOS), {"bos_token": BOS, "eos_token": EOS}, [0], [1]),
        (None, {"eos_token": EOS}, [], [1]),
        # One token for both ends.
        (None, {"bos_token": BOS, "eos_token": BOS}, [0], [0]),
        (_template(BOS, None), {"bos_token": BOS, "eos_token": BOS}, [0], [0]),
        (_template(None, BOS), {"bos_token": BOS, "eos_token": BOS}, [0], [0]),
        (_template(BOS, None, BOS), {"bos_token": BOS, "eos_token": BOS}, [0], [0]),
        # A template that begins a text with the token that ends it.
        (_template(EOS, None), {"eos_token": EOS}, [1], [1]),
    ],
)
def test_a_document_begins_and_ends_once_whatever_the_template_adds(assets, tmp_path, template, config, begin, end):
    plain = load_tokenizer(assets).encode(TEXT, add_bos=True, add_eos=True)[1:-1]
    folder = _changed(assets, tmp_path / "changed", config, post_processor=template)
    for name, load in DOORS.items():
        assert load(folder).encode(TEXT, add_bos=True, add_eos=True) == [*begin, *plain, *end], name


@pytest.mark.parametrize("config", [{}, {"bos_token": BOS}, None], ids=["empty", "no eos_token", "no config"])
def test_a_tokenizer_without_an_end_of_document_is_refused_by_everyone(assets, tmp_path, config):
    folder = _changed(assets, tmp_path / "changed", config)
    if config is None:
        (folder / "tokenizer_config.json").unlink()
    message = "has no token that ends a document, so documents would run into each other: its tokenizer_config.json"
    with pytest.raises(UnfitTokenizer, match=message):
        load_tokenizer(folder)
    with pytest.raises(UserError, match=f"--tokenizer {folder} {message}"):
        tokenizer_of_tokens(str(folder))
    with pytest.raises(UserError, match=f"{folder} {message}"):
        perplexity._tokenizer(str(folder))
    with pytest.raises(UserError, match=f"^changed {message}"):
        hub.describe(folder)
