"""The tokenizer of a folder, as training, tokenizing, evaluation and export read it: one that only knows texts."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from nitp_titan.errors import first_line
from nitp_titan.machine.failures import surroundings


class UnfitTokenizer(ValueError):
    """Why a folder holds no tokenizer to train with, as the end of a sentence that begins with the folder."""


class TextTokenizer(HuggingFaceTokenizer):
    """TorchTitan's tokenizer, for which all of a text is text.

    Truncation and padding, which a tokenizer.json may hold, are off. The string of a special token in a text is encoded
    as the characters that it has: no text ends a document or begins one.
    """

    hf_adds_bos: bool
    hf_adds_eos: bool

    def _load_tokenizer_from_path(self, tokenizer_path: str) -> Tokenizer:
        tokenizer = super()._load_tokenizer_from_path(tokenizer_path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _infer_should_add_bos_eos(self) -> None:
        super()._infer_should_add_bos_eos()
        # TorchTitan looks at the tokens of an empty text, where one that begins a text looks like one that ends it.
        if self.hf_adds_eos and len(self.tokenizer.encode("").ids) == 1:
            self.hf_adds_eos = self.tokenizer.encode("a").ids[-1] == self.eos_id
            self.hf_adds_bos = self.hf_adds_bos and not self.hf_adds_eos


class CachedTokenizer(TextTokenizer):
    """Read once by a start that builds it twice: to check it, and to train with it.

    One of 150,000 tokens takes half a second to read.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTokenizer.Config):
        def build(self, *, tokenizer_path: str) -> TextTokenizer:
            """The tokenizer of a folder; the same one until a file there changes."""
            return _built(tokenizer_path, _modified(tokenizer_path))


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a folder.

    Raises:
        UnfitTokenizer: if it is missing, does not load or does not end a document.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise UnfitTokenizer(" holds no tokenizer.json.")
    try:
        tokenizer = TextTokenizer(tokenizer_path=str(folder))
    except Exception as error:
        # The tokenizers' library raises nothing narrower.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise surroundings(error, str(folder)) or UnfitTokenizer(f" holds no tokenizer that loads: {reason}") from None
    check_end_of_document(tokenizer)
    return tokenizer


def check_end_of_document(tokenizer: BaseTokenizer) -> None:
    """Raise UnfitTokenizer unless a tokenizer ends every document."""
    if tokenizer.eos_id is None:
        raise UnfitTokenizer(
            " has no token that ends a document, so documents would run into each other: its tokenizer_config.json "
            "must name an eos_token."
        )
    if tokenizer.encode("", add_bos=True, add_eos=True)[-1] != tokenizer.eos_id:
        raise UnfitTokenizer(
            " does not end a document with its eos_token: look at the post_processor of its tokenizer.json."
        )


def _modified(folder: str) -> tuple[tuple[str, int], ...]:
    with os.scandir(folder) as files:
        return tuple(sorted((file.name, file.stat(follow_symlinks=False).st_mtime_ns) for file in files))


@lru_cache(maxsize=1)
def _built(folder: str, modified: tuple[tuple[str, int], ...]) -> TextTokenizer:
    return TextTokenizer(tokenizer_path=folder)
