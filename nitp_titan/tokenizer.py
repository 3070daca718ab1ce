"""TorchTitan's tokenizer, read once by a start that builds it twice: to check it, and to train with it."""

import os
from dataclasses import dataclass
from functools import lru_cache

from torchtitan.components.tokenizer import HuggingFaceTokenizer


class CachedTokenizer(HuggingFaceTokenizer):
    """Its config builds TorchTitan's own tokenizer; one of 150,000 tokens takes half a second to read."""

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTokenizer.Config):
        def build(self, *, tokenizer_path: str) -> HuggingFaceTokenizer:
            """The tokenizer of a folder; the same one until a file there changes."""
            return _built(tokenizer_path, _modified(tokenizer_path))


def _modified(folder: str) -> tuple[tuple[str, int], ...]:
    with os.scandir(folder) as files:
        return tuple(sorted((file.name, file.stat(follow_symlinks=False).st_mtime_ns) for file in files))


@lru_cache(maxsize=1)
def _built(folder: str, modified: tuple[tuple[str, int], ...]) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tokenizer_path=folder)
