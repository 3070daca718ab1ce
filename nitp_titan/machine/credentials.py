"""Access tokens and passwords come from the environment and are written nowhere. Imports no torch."""

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

from nitp_titan.errors import UserError

# HF_TOKEN, HUGGING_FACE_HUB_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ...
_VARIABLE = re.compile(r"(^|_)(TOKEN|API_?KEY|ACCESS_KEY|ACCESS_KEY_ID|SECRET|SECRET_KEY|PASSWORD)$")
# A shorter value is found in innocent text too.
_MIN_LENGTH = 8
_IN_URL = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")
_HIDDEN = "***"


def _secrets() -> dict[str, str]:
    """Variables of the environment that hold a secret, the longest value first, as one may contain another."""
    found = {name: value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _MIN_LENGTH}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def redact(text: str) -> str:
    """``text`` with the secrets of the environment, and the user of a URL, replaced by ``***``."""
    for value in _secrets().values():
        text = text.replace(value, _HIDDEN)
    return _IN_URL.sub(_HIDDEN, text)


def check_settings(config) -> None:
    """Raise UserError if a setting of a ``Trainer.Config`` holds a secret: settings are logged and written."""
    secrets = _secrets()
    for section in dataclasses.fields(config):
        if section.name == "model_spec":
            continue
        for path, text in _texts(getattr(config, section.name)):
            what = next((f"the value of {name}" for name, value in secrets.items() if value in text), None)
            if what is None and _IN_URL.search(text):
                what = "a user or password in a URL"
            if what is not None:
                # A top-level key has no path.
                table, key = (section.name, path) if path else ("", section.name)
                place = f"[{table}] {key}" if path else key
                raise UserError(
                    f"{place} holds {what}. Settings are written into the run folder; tokens and passwords come from "
                    "the environment alone, for example HF_TOKEN.",
                    table=table,
                    key=key.partition(".")[0].partition("[")[0],
                )


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All strings in a config, with their paths: ``dataset_path``, ``sources[0].dataset_path``."""
    if isinstance(value, str):
        yield path, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if not field.name.startswith("_"):
                yield from _texts(getattr(value, field.name, None), f"{path}.{field.name}".lstrip("."))
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _texts(entry, f"{path}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _texts(entry, f"{path}[{index}]")
