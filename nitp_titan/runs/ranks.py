"""The ranks of a run compare what they are about to run: a difference is found at the start and not after hours."""

import hashlib
import json
import os
import socket
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.trainer import Trainer

from nitp_titan.config.build import tables_of
from nitp_titan.config.tables import flat_settings
from nitp_titan.errors import changed_values, first_few, setting_repr, UserError
from nitp_titan.runs import provenance
from nitp_titan.runs.data_facts import by_name
from nitp_titan.runs.run_folder import ResumePlan

_DIGITS = 12


def leads_node(config) -> bool:
    """Whether this rank looks at files for all ranks of its node: a file system would slow down under thousands."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or is_alone(config)


def is_alone(config) -> bool:
    """Whether this process is the whole run."""
    # Of simulated ranks only this one is there.
    return config.comm.mode in ("fake_backend", "local_tensor") or os.environ.get("WORLD_SIZE", "1") == "1"


def agree(config: Trainer.Config, plan: ResumePlan | None) -> tuple[list[str], ResumePlan]:
    """Let all ranks agree on what they run; then rank 0 claims the run folder before any rank uses it. A collective.

    Args:
        config: the ``NITPTrainer.Config`` that this rank has read.
        plan: what the first rank of a node found in the run folder; None on its other ranks.

    Returns:
        Names of the hosts, each once; and the plan of rank 0, on other ranks without its data.

    Raises:
        UserError: as `check_ranks_agree` and `ResumePlan.claim`.
    """
    alone = is_alone(config)
    hosts = [socket.gethostname()]
    if not alone:
        hosts = check_ranks_agree(flat_settings(tables_of(config)), None if plan is None else local_facts(plan))
    if dist.get_rank() == 0:
        plan.claim()
    if not alone:
        # Not a barrier, which for NCCL wants to know the device.
        found = [plan and replace(plan, data=None)]
        dist.broadcast_object_list(found, src=0)
        if dist.get_rank() != 0:
            plan = found[0]
    return hosts, plan


def local_facts(plan: ResumePlan) -> dict[str, Any]:
    """What has to be the same on all nodes besides the settings, by the name that messages give it.

    Args:
        plan: what the first rank of this node found in the run folder.
    """
    found: dict[str, Any] = {"nitp_titan code": provenance.code_hash()[:_DIGITS]}
    found |= provenance.versions()
    found |= by_name(plan.data)
    found["--overwrite"] = bool(plan.archived)
    found["checkpoint to resume from"] = plan.from_step
    found["initial checkpoint"] = plan.initial_load_path
    return found


def largest(value: int, group: dist.ProcessGroup | None) -> int:
    """The largest value of all ranks of a CPU group, or this rank's without one. A collective."""
    if group is None:
        return value
    found = torch.tensor(int(value))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return int(found)


def check_ranks_agree(settings: dict[str, Any], facts: dict[str, Any] | None = None) -> list[str]:
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
    """Differences of a rank from rank 0, as one short text; empty if they agree."""
    return first_few(
        [
            f"{name} = {setting_repr(value)}, rank 0 has {setting_repr(other)}"
            for name, (other, value) in changed_values(first, mine).items()
        ]
    )


def message(by_rank: list[str]) -> str:
    """One line of the differences of every rank, ranks that differ alike together."""
    alike: dict[str, list[int]] = {}
    for rank, text in enumerate(by_rank):
        if text:
            alike.setdefault(text, []).append(rank)
    parts = [f"{_ranks(ranks)}: {text}" for text, ranks in alike.items()]
    return f"the ranks of this run do not agree. {first_few(parts)}. All of them must read the same files."


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"ranks {', '.join(map(str, ranks[:4]))}{more}"
