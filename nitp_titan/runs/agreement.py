"""The ranks of a run compare what they are about to run: a difference is found at the start and not after hours."""

import hashlib
import json
import os
import socket
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from nitp_titan.errors import UserError
from nitp_titan.runs import provenance, run_folder
from nitp_titan.runs.data_facts import by_name

_DIGITS = 12


def leads_node(config) -> bool:
    """Whether this rank looks at files for all ranks of its node: a file system would slow down under thousands."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or _is_alone(config)


def _is_alone(config) -> bool:
    # Of simulated ranks only this one is there.
    return config.comm.mode in ("fake_backend", "local_tensor") or os.environ.get("WORLD_SIZE", "1") == "1"


def settle(config, start: run_folder.Start | None) -> tuple[list[str], run_folder.Start]:
    """Let all ranks agree on what they run; then rank 0 settles the run folder before any rank uses it. A collective.

    Args:
        config: the ``NITPTrainer.Config`` that this rank has read.
        start: what the first rank of a node found in the run folder; None on its other ranks.

    Returns:
        Names of the hosts, each once; and what rank 0 found.

    Raises:
        UserError: as `check` and `Start.settle`.
    """
    alone = _is_alone(config)
    hosts = [socket.gethostname()] if alone else check(settings(config), None if start is None else facts(start))
    if dist.get_rank() == 0:
        start.settle()
    if not alone:
        # Not a barrier, which for NCCL wants to know the device.
        found = [start and replace(start, data=None)]
        dist.broadcast_object_list(found, src=0)
        start = start or found[0]
    return hosts, start


def settings(config) -> dict[str, Any]:
    """Every setting of a ``NITPTrainer.Config``, by the name that messages give it."""
    from nitp_titan.config import build

    return run_folder.named(build.to_tables(config))


def facts(start: run_folder.Start) -> dict[str, Any]:
    """What has to be the same on all nodes besides the settings, by the name that messages give it.

    Args:
        start: what the first rank of this node found in the run folder.
    """
    found: dict[str, Any] = {"nitp_titan code": provenance.code_hash()[:_DIGITS]}
    found |= provenance.versions()
    found |= by_name(start.data)
    found["--overwrite"] = bool(start.set_aside)
    found["checkpoint to go on from"] = start.from_step
    found["initial checkpoint"] = start.initial_load_path
    return found


def largest(value: int, group: dist.ProcessGroup | None) -> int:
    """The largest value of all ranks of a CPU group, or this rank's without one. A collective."""
    if group is None:
        return value
    found = torch.tensor(int(value))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return int(found)


def check(settings: dict[str, Any], facts: dict[str, Any] | None = None) -> list[str]:
    """Compare what all ranks run with what rank 0 runs. A collective.

    Args:
        settings: of this rank.
        facts: of this node; None on all ranks of it but one.

    Returns:
        Names of the hosts, each once.

    Raises:
        UserError: on all ranks alike, naming the ranks that differ, in what, and the values.
    """
    answers = _gathered((_digest(settings), facts and _digest(facts), socket.gethostname()))
    digests, of_nodes, hosts = zip(*answers)
    if len(set(digests)) > 1 or len(set(of_nodes) - {None}) > 1:
        theirs = [(settings, facts)]
        dist.broadcast_object_list(theirs, src=0)
        first = theirs[0][0] | (theirs[0][1] if facts is not None else {})
        raise UserError(message(_gathered(differences(first, settings | (facts or {})))))
    return list(dict.fromkeys(hosts))


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


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
