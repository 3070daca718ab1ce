"""The ranks of a run compare what they are about to run: a difference is found at the start and not after hours."""

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nitp_titan.config import UserError
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.mixtures import MIXTURES
from nitp_titan.data.sources import local_files
from nitp_titan.data.tokenized import MANIFEST, tokenizer_hashes, TOKENS
from nitp_titan.files import sha256
from nitp_titan.run import provenance, run_folder

_DIGITS = 12


def settle(config, start: run_folder.Start) -> list[str]:
    """Let all ranks agree on what they run; then rank 0 settles the run folder before any rank uses it. A collective.

    Returns:
        Names of the hosts, each once.

    Raises:
        UserError: as `check` and `Start.settle`.
    """
    # Of simulated ranks only this one is there.
    alone = config.comm.mode in ("fake_backend", "local_tensor") or dist.get_world_size() == 1
    hosts = [socket.gethostname()] if alone else check(facts(config, start))
    if dist.get_rank() == 0:
        start.settle()
    if not alone:
        # Not a barrier, which for NCCL wants to know the device.
        dist.broadcast_object_list([None], src=0)
    return hosts


def facts(config, start: run_folder.Start) -> dict[str, Any]:
    """What has to be the same on all ranks, by the name that messages give it.

    Args:
        config: the ``NITPTrainer.Config`` of this rank.
        start: what this rank found in the run folder.
    """
    from nitp_titan import schema

    found = run_folder.named(schema.to_tables(config))
    found["nitp_titan code"] = provenance.code_hash()[:_DIGITS]
    found |= provenance.versions()
    for file, digest in tokenizer_hashes(config.hf_assets_path).items():
        found[f"hash of {Path(config.hf_assets_path) / file}"] = digest[:_DIGITS]
    for name, loader in (("dataloader", config.dataloader), ("validator.dataloader", config.validator.dataloader)):
        if isinstance(loader, TextDataLoader.Config) and (name == "dataloader" or config.validator.enable):
            found |= {f"size of {path}": Path(path).stat().st_size for path in _files(loader)}
            # It holds the hashes of the files of tokens.
            found |= {f"hash of {path}": sha256(path)[:_DIGITS] for path in _manifests(loader)}
    found["--overwrite"] = bool(start.set_aside)
    found["checkpoint to go on from"] = start.from_step
    return found


def _files(loader: TextDataLoader.Config) -> list[str]:
    places = [(source.dataset_path, source.dataset) for source in _sources(loader) if source.dataset_path]
    return [file for path, kind in places for file in local_files(path, kind)]


def _manifests(loader: TextDataLoader.Config) -> list[Path]:
    return [Path(source.dataset_path) / MANIFEST for source in _sources(loader) if source.dataset == TOKENS]


def _sources(loader: TextDataLoader.Config) -> list:
    return loader.sources or MIXTURES.get(loader.mixture) or [loader]


def largest(value: int, group: dist.ProcessGroup | None) -> int:
    """The largest value of all ranks of a CPU group, or this rank's without one. A collective."""
    if group is None:
        return value
    found = torch.tensor(int(value))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return int(found)


def check(mine: dict[str, Any]) -> list[str]:
    """Compare the facts of all ranks with those of rank 0. A collective.

    Returns:
        Names of the hosts, each once.

    Raises:
        UserError: on all ranks alike, naming the ranks that differ, in what, and the values.
    """
    text = json.dumps(mine)
    answers = _gathered((hashlib.sha256(text.encode()).hexdigest(), socket.gethostname()))
    digests, hosts = zip(*answers)
    if len(set(digests)) > 1:
        theirs = [text]
        dist.broadcast_object_list(theirs, src=0)
        raise UserError(message(_gathered(differences(json.loads(theirs[0]), json.loads(text)))))
    return list(dict.fromkeys(hosts))


def _gathered(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def differences(first: dict[str, Any], mine: dict[str, Any]) -> str:
    """What a rank has and rank 0 has not, as one short text; empty if they agree."""
    return run_folder.listed(
        [
            f"{name} = {run_folder.shown_setting(value)}, rank 0 has {run_folder.shown_setting(other)}"
            for name, (other, value) in run_folder.changed_values(first, mine).items()
        ]
    )


def message(by_rank: list[str]) -> str:
    """One line of the differences of every rank, ranks that differ alike together."""
    alike: dict[str, list[int]] = {}
    for rank, text in enumerate(by_rank):
        if text:
            alike.setdefault(text, []).append(rank)
    parts = [f"{_ranks(ranks)}: {text}" for text, ranks in alike.items()]
    return f"the ranks of this run do not agree. {run_folder.listed(parts)}. All of them must read the same files."


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"ranks {', '.join(map(str, ranks[:4]))}{more}"
