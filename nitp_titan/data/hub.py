"""Tokenizers from the Hugging Face hub, fetched once into a folder of assets.

Only the files of the tokenizer: the configuration and the weights beside them belong to another model.
"""

import json
import os
from pathlib import Path

from nitp_titan.errors import first_line, nearest_choice, UserError
from nitp_titan.files import draft_of

TOKENIZERS = {
    # Apache-2.0. 151,646 tokens; its models, and the paper's, have 152,064 rows.
    "qwen2": "Qwen/Qwen2-7B",
    # Apache-2.0. Llama 2's 32,000 tokens without its gate.
    "llama2": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    # Llama 3 licence, behind a gate. 128,256 tokens.
    "llama3": "meta-llama/Meta-Llama-3-8B",
}
_FILES = {"tokenizer.json": True, "tokenizer_config.json": True, "special_tokens_map.json": False}
_ORIGIN = "origin.json"


def hub_token() -> str | bool:
    """Access token for the hub; False, unlike None, keeps its libraries from sending a cached login."""
    return os.environ.get("HF_TOKEN") or False


def without_download_counts() -> None:
    """Keep `datasets` from telling a server that counts downloads of everything it opens, local files too."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def repository(name: str) -> str:
    """Repository ``owner/name`` of a registered tokenizer, or the name itself if it is one; else UserError."""
    if name in TOKENIZERS or name.count("/") == 1:
        return TOKENIZERS.get(name, name)
    near = nearest_choice(name, [*TOKENIZERS])
    raise UserError(f"'{name}' is neither a registered tokenizer nor a repository 'owner/name'.{near}")


def download_tokenizer(name: str, out: Path) -> dict:
    """Fetch a tokenizer into ``out/<name>``, unless it is there. Its files appear together or not at all.

    The access token comes from the environment variable ``HF_TOKEN`` alone; a cached login is not used.

    Args:
        name: registered name, or ``owner/name`` of a repository, whose folder is ``name``.
        out: folder of assets.

    Returns:
        ``folder``, ``repository``, ``commit``; ``new`` says whether anything was fetched.

    Raises:
        UserError: naming the tokenizer and the reason, if it cannot be fetched or does not load.
    """
    repo, folder = repository(name), out / name.split("/")[-1]
    origin = _origin(folder, repo)
    if origin is not None:
        return {"folder": folder, **origin, "new": False}
    try:
        with draft_of(folder) as draft:
            origin = {"repository": repo, "commit": _fetch(repo, draft.with_name("hub"), draft)}
            (draft / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
            describe(draft)
            draft.rename(folder)
    except UserError:
        raise
    except Exception as error:
        # The hub, the network, the disk and a broken tokenizer.json raise many types; each ends the download.
        raise UserError(f"{name}: {_reason(error, repo)}") from error
    return {"folder": folder, **origin, "new": True}


def _origin(folder: Path, repo: str) -> dict | None:
    """Origin of an earlier fetch into the folder, None without one; UserError if it is another repository."""
    if not folder.exists():
        return None
    try:
        origin = json.loads((folder / _ORIGIN).read_text())
    except (OSError, ValueError):
        origin = {}
    if origin.get("repository") != repo:
        raise UserError(f"{folder} exists and was not fetched from {repo}; remove it, or choose another --out.")
    return origin


def _fetch(repo: str, cache: Path, draft: Path) -> str | None:
    """Fetch the files of one commit into ``draft``; returns the commit, None where the hub does not name it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()
    token = hub_token()
    commit = get_hf_file_metadata(hf_hub_url(repo, "tokenizer.json"), token=token).commit_hash
    for file, required in _FILES.items():
        try:
            path = hf_hub_download(repo, file, revision=commit, local_dir=cache, token=token)
        except RemoteEntryNotFoundError:
            if required:
                raise
            continue
        os.replace(path, draft / file)
    return commit


def _reason(error: Exception, repo: str) -> str:
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        todo = "this HF_TOKEN has no access" if os.environ.get("HF_TOKEN") else "needs HF_TOKEN in the environment"
        return f"{repo} is gated and {todo}; access is granted on https://huggingface.co/{repo}."
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no public repository {repo} on the Hugging Face hub; a private one needs HF_TOKEN."
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo} holds no tokenizer.json with a tokenizer_config.json."
    return f"{repo} could not be fetched: {type(error).__name__}: {first_line(error)}"


def describe(folder: Path) -> str:
    """Size and end-of-document token of a tokenizer as training sees it; UserError unless it has both."""
    # With it comes a part of TorchTitan.
    from nitp_titan.data.tokenizer import load_tokenizer, UnfitTokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except UnfitTokenizer as error:
        raise UserError(f"{folder.name}{error}") from None
    return f"{tokenizer.get_vocab_size():,} tokens, end of document {tokenizer.eos_token} ({tokenizer.eos_id})"
