"""Causal language models in the Hugging Face format: loaded from safetensors alone, without remote code.

Needs transformers, which the extra ``eval`` installs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nitp_titan.data.hub import hub_token
from nitp_titan.errors import nearest_choice, UserError
from nitp_titan.export.dtypes import DTYPES
from nitp_titan.machine.failures import explained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# In place of a device: a model that fits into no single one is spread over all that there are.
SPREAD = "spread"


@dataclass(frozen=True)
class Model:
    """A model by name.

    Args:
        name: what tables and files call it.
        source: its folder, or ``owner/name`` on the Hugging Face hub.
    """

    name: str
    source: str


def require(package: str) -> None:
    """Raise UserError unless a package of the extra ``eval`` is installed."""
    if find_spec(package) is None:
        raise UserError(f"this needs the package {package}; install it with `pip install -e '.[eval]'`.")


def check_model(name: str) -> None:
    """Raise UserError unless ``name`` is a folder with a model, or could be a name on the Hugging Face hub.

    A name is taken for the hub's only if there is no such folder and it has the form ``owner/name``; nothing is fetched
    here.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            siblings = [str(path.parent) for path in folder.glob("*/config.json")]
            raise UserError(
                f"{name} holds no config.json, so it is no Hugging Face model.{nearest_choice(name, siblings)} "
                "`python scripts/export_hf.py` makes one from a checkpoint."
            )
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{name} holds no safetensors; other formats can run code and are not loaded.")
    elif name.count("/") != 1 or folder.is_absolute() or name.startswith("."):
        siblings = [str(path) for path in folder.parent.glob("*") if path.is_dir()] if folder.parent.is_dir() else []
        near = nearest_choice(name, siblings)
        raise UserError(f"{name} is neither a folder nor a model 'owner/name' of the Hugging Face hub.{near}")


def read_models(arguments: Sequence[str]) -> list[Model]:
    """Models of ``[NAME=]SOURCE`` arguments, the baseline first.

    A model without a name is called as its folder, or, where two folders are called alike, by its whole path.

    Raises:
        UserError: if one is missing, or two have the same name.
    """
    split = [_split(argument) for argument in arguments]
    folders = [Path(source).name for _, source in split]
    models = []
    for (name, source), folder in zip(split, folders, strict=True):
        check_model(source)
        models.append(Model(name or (folder if folders.count(folder) == 1 else source), source))
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--model: two models are called '{name}'; give names: --model NTP=DIR NITP=DIR.")
    return models


def _split(argument: str) -> tuple[str, str]:
    # A folder may have '=' in its own name.
    if Path(argument).is_dir():
        return "", argument
    name, _, source = argument.rpartition("=")
    return name, source


def without_bos(tokenizer: "PreTrainedTokenizerBase", what: str) -> list[str]:
    """A warning that a tokenizer does not begin texts with its BOS token, as documents begin in training; or none.

    Args:
        what: begins without it.
    """
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer.encode("a")[:1] == [bos]:
        return []
    return [f"{what} do not begin with {tokenizer.bos_token}, as documents do in training."]


def load_pretrained(
    name: str, *, dtype: str = "float32", device: str | torch.device = "cpu"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A model for inference, with its tokenizer.

    Args:
        name: folder, or ``owner/name`` on the Hugging Face hub; only the latter uses the network, with the access
            token of the environment variable ``HF_TOKEN`` and no other.
        dtype: key of `DTYPES`, which the weights are converted to.
        device: as torch names it, or `SPREAD`.

    Raises:
        UserError: naming the model and the reason, if it is missing or does not load.
    """
    require("transformers")
    check_model(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": False, "token": hub_token(), "local_files_only": Path(name).is_dir()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        # Nothing but what is asked for cuts or fills up a text.
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        placed = options | ({"device_map": "auto"} if device == SPREAD else {})
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], use_safetensors=True, **placed)
    except Exception as error:
        # The hub, the network, the disk and broken files raise many types; each means that the model is not there.
        raise explained(error, name, f"{name} does not load") from error
    return (model if device == SPREAD else model.to(device)).eval(), tokenizer
