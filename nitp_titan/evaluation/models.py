"""A model of an evaluation in memory, and what identifies its results."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nitp_titan.data.hub import hub_token
from nitp_titan.errors import UserError
from nitp_titan.machine.failures import explained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with the number of sequences that it takes at a time."""

    source: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    batch_size: int


def fingerprint(source: str) -> str:
    """Hash that changes with the model: its JSON files, and names, sizes and times of its safetensors.

    A model of the hub is known by its commit, or without network by the commit that is cached.
    """
    folder = Path(source)
    if not folder.is_dir():
        return f"{source}@{_commit(source)}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(repr((path.name, path.read_bytes())).encode())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(repr((path.name, path.stat().st_size, path.stat().st_mtime_ns)).encode())
    return digest.hexdigest()


def check_hub() -> None:
    """Raise UserError unless the hub answers, or its libraries are told to do without.

    Each of a suite's data sets would else be tried for half a minute.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:
        raise UserError(
            f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}), where the suite's data come from. With "
            "HF_HUB_OFFLINE=1 those that are cached here are used; --suite local and --text need no network."
        ) from None


def num_positions(source: str) -> int | None:
    """Positions that a model allows; where its config.json is silent, those of its class. None without a limit.

    Raises:
        UserError: if there is no configuration that can be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, token=hub_token())
    except Exception as error:
        # The hub, the network and broken files raise many types; each means that the model is not there.
        raise explained(error, source, f"{source} does not load") from error
    # Of GPT-2 it is the other name of n_positions.
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _commit(name: str) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return HfApi().model_info(name, token=hub_token()).sha
    except Exception:
        # No network, no such name, no access: loading the model says which, if it is not cached.
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else "unknown"
