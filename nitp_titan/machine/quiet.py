"""Warnings of libraries that no user of this project can act on. Imports no torch.

Everything else is shown. A message is named by its beginning, so that another one of the same logger comes through.
"""

import logging
import warnings
from functools import cache

# Logger -> beginnings of messages.
_ALWAYS = {
    # torchao registers its own enums in a way that torch will change.
    "torch.utils._pytree": ["%s is an Enum subclass and is now natively supported by torch.compile"],
    # Of an index of weights beside the tokenizer, for a save in Hugging Face's format with several files.
    "": ["model.safetensors.index.json not found at hf_assets_path"],
}
_ALWAYS_WARNINGS = [
    "'set_vital' is deprecated",
    # TorchTitan asks so when it loads the schedule, and gets what it wants.
    "To get the last learning rate computed by the scheduler",
]
# About the FLOPs of a GPU, NCCL, and random numbers that differ between shards on a GPU.
_ON_CPU = {
    "": [
        "Error running lspci: ",
        "Peak flops undefined for: CPU",
        "ENV[TORCH_NCCL_ASYNC_ERROR_HANDLING] = ",
    ]
}
_ON_CPU_WARNINGS = ["DTensor (random operators|manual_seed\\(\\)) may not have complete support on cpu"]


class _Filter(logging.Filter):
    def __init__(self, beginnings: list[str]):
        super().__init__()
        self._beginnings = tuple(beginnings)

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginnings)


@cache
def install() -> None:
    """Before TorchTitan is imported."""
    _install(_ALWAYS, _ALWAYS_WARNINGS)


@cache
def install_on_cpu() -> None:
    """Drops messages that do not concern a CPU."""
    _install(_ON_CPU, _ON_CPU_WARNINGS)


def _install(messages: dict[str, list[str]], python_warnings: list[str]) -> None:
    for name, beginnings in messages.items():
        logging.getLogger(name).addFilter(_Filter(beginnings))
    for message in python_warnings:
        warnings.filterwarnings("ignore", message=message)
