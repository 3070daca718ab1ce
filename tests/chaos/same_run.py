"""Whether two run folders hold the same training: each step once, equal records, equal states."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitp_titan.checkpoint.steps import complete_steps, METADATA

# Of a record, what depends on the machine's load.
_MEASURED = {"tokens_per_second", "seconds_per_step", "memory_gib"}
# What drafts are called while they are written, by us and by DCP.
_DRAFT = re.compile(r"\.tmp$|\.incomplete$|^\.(?!metadata$)")


@dataclass
class Comparison:
    """How a run differs from its reference."""

    problems: list[str] = field(default_factory=list)
    deviation: float = 0.0
    """Largest difference of a number, divided by the largest number of its tensor, or by the number of a record."""


def compare(reference: Path, folder: Path, *, tolerance: float = 0.0) -> Comparison:
    """Compare a run with another one of the same settings that nothing stopped.

    Args:
        reference, folder: the run folders.
        tolerance: allowed deviation (`Comparison.deviation`); 0 asks for equal bits.

    Returns:
        All problems: in any ``*.jsonl`` with steps one that is missing, stands twice or differs (but for speed, time
        and memory); a checkpoint that is missing, surplus or half-written; a state that differs; a draft that was left.
    """
    found = Comparison()
    for path in sorted(reference.glob("*.jsonl")):
        _compare_records(path, folder / path.name, tolerance, found)
    _compare_checkpoints(reference / "checkpoint", folder / "checkpoint", tolerance, found)
    drafts = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if _DRAFT.search(path.name)]
    found.problems += [f"{draft} is left" for draft in drafts]
    return found


def complete_checkpoints(folder: Path, num_ranks: int) -> set[int]:
    """Steps of the checkpoints that have their metadata and the file of every rank.

    Args:
        folder: of all checkpoints of a run.
    """
    files = [f"__{rank}_0.distcp" for rank in range(num_ranks)]
    steps = complete_steps(folder, [METADATA])
    return {step for step, path in steps.items() if all((path / file).is_file() for file in files)}


def _compare_records(reference: Path, path: Path, tolerance: float, found: Comparison) -> None:
    expected = _records(reference)
    if not all("step" in record for record in expected):
        # Such as a list of the starts, which is longer after a kill.
        return
    if not path.is_file():
        return found.problems.append(f"{path.name} is missing")
    try:
        records = _records(path)
    except ValueError as error:
        return found.problems.append(f"{path.name} has a line that is no JSON ({error})")
    times = Counter(record["step"] for record in records)
    steps = [record["step"] for record in expected]
    found.problems += [f"{path.name}: step {step} is missing" for step in steps if step not in times]
    found.problems += [f"{path.name}: step {step} appears {n} times" for step, n in times.items() if n > 1]
    found.problems += [f"{path.name}: there is no step {step} in the reference" for step in times if step not in steps]
    by_step = {record["step"]: record for record in records}
    if [record["step"] for record in records] != sorted(record["step"] for record in records):
        found.problems.append(f"{path.name}: its steps are out of order")
    for record in expected:
        mine = by_step.get(record["step"], record)
        for key in sorted({*record, *mine} - _MEASURED):
            deviation = _deviation(record.get(key), mine.get(key))
            found.deviation = max(found.deviation, deviation)
            if deviation > tolerance:
                values = f"{_short(mine.get(key))} instead of {_short(record.get(key))}"
                found.problems.append(f"{path.name}: step {record['step']} has {key} = {values}")


def _records(path: Path) -> list[dict[str, Any]]:
    # Not `read_records`, which forgives a last line that was cut short.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _deviation(expected: Any, value: Any) -> float:
    """Largest relative difference of the numbers of two JSON values; infinity where they are of another kind."""
    if expected == value:
        return 0.0
    if isinstance(expected, dict) and isinstance(value, dict) and expected.keys() == value.keys():
        return max(_deviation(expected[key], value[key]) for key in expected)
    if isinstance(expected, list) and isinstance(value, list) and len(expected) == len(value):
        return max(map(_deviation, expected, value))
    if isinstance(expected, float) and isinstance(value, float):
        if math.isnan(expected) and math.isnan(value):
            return 0.0
        return abs(expected - value) / abs(expected) if expected and math.isfinite(expected - value) else math.inf
    return math.inf


def _compare_checkpoints(reference: Path, folder: Path, tolerance: float, found: Comparison) -> None:
    expected = {path.name: path for path in reference.glob("step-*")}
    steps = {path.name: path for path in folder.glob("step-*")}
    whole = []
    for name in sorted({*expected, *steps}):
        if name not in steps:
            found.problems.append(f"checkpoint/{name} is missing")
        elif not (steps[name] / METADATA).is_file():
            found.problems.append(f"checkpoint/{name} is half-written: it has no {METADATA}")
        elif name not in expected:
            found.problems.append(f"checkpoint/{name} is not in the reference")
        else:
            whole.append(name)
    surplus = [path.name for path in folder.glob("*") if not path.name.startswith("step-")]
    found.problems += [f"checkpoint/{name} is left" for name in sorted(surplus)]
    for name in whole:
        _compare_states(expected[name], steps[name], tolerance, found)


def _compare_states(reference: Path, folder: Path, tolerance: float, found: Comparison) -> None:
    import torch

    from nitp_titan.errors import UserError

    name = f"checkpoint/{folder.name}"
    try:
        expected, states = _states(reference), _states(folder)
    except UserError as error:
        return found.problems.append(str(error))
    if expected.keys() != states.keys():
        found.problems.append(f"{name}: '{min(expected.keys() ^ states.keys())}' is in one of the two only")
    for key in sorted(expected.keys() & states.keys()):
        mine, theirs = states[key], expected[key]
        if not isinstance(theirs, torch.Tensor) or not isinstance(mine, torch.Tensor):
            if not _equal(theirs, mine):
                found.problems.append(f"{name}: '{key}' is {mine!r:.60} instead of {theirs!r:.60}")
        elif mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            found.problems.append(f"{name}: '{key}' is of another shape or type")
        elif not _equal(theirs, mine):
            difference = (mine.double() - theirs.double()).abs().max() / theirs.double().abs().max()
            # A NaN in one of them alone is above every tolerance.
            deviation = float(difference.nan_to_num(nan=math.inf))
            found.deviation = max(found.deviation, deviation)
            if deviation > tolerance:
                found.problems.append(f"{name}: '{key}' differs by {deviation:.1e}")


def _equal(left: Any, right: Any) -> bool:
    """Whether two states are equal; of tensors every bit."""
    import torch

    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.shape == right.shape and left.dtype == right.dtype
        return same and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and type(left) is type(right):
        return len(left) == len(right) and all(map(_equal, left, right))
    return type(left) is type(right) and left == right


def _states(folder: Path) -> dict[str, Any]:
    """Everything that a checkpoint holds, by name."""
    import torch
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from nitp_titan.checkpoint import safe_dcp

    reader = safe_dcp.reader(folder)
    entries = reader.metadata.state_dict_metadata
    states: dict[str, Any] = dict.fromkeys(entries)
    for name, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            states[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    safe_dcp.load(states, reader, no_dist=True)
    return states
