"""Value constraints beyond types, checked for every ``Trainer.Config`` however it was set."""

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import optim
from torch._dynamo import list_backends

from nitp_titan.config.schedules import BASE_SCHEDULES, SCHEDULES
from nitp_titan.errors import invalid, nearest_choice, UserError

# What an int32 of TorchTitan's or torch's still holds; a seed may be any of torch's.
_LARGEST, _LARGEST_SEED = 2**31 - 1, 2**63 - 1
_LARGEST_FLOAT32 = 3.4028234663852886e38


class Constraint(NamedTuple):
    """A condition, what to say where it does not hold, and the valid choices where they can be listed."""

    holds: Callable[[Any], bool]
    allowed: str
    choices: tuple[str, ...] = ()


def _at_least(limit: float) -> Constraint:
    return Constraint(lambda value: value >= limit, f"at least {limit}")


def _one_of(*choices: str) -> Constraint:
    return Constraint(lambda value: value in choices, f"one of {', '.join(map(repr, choices))}", choices)


def _list_of(*choices: str) -> Constraint:
    allowed = f"a list of {', '.join(map(repr, choices))}"
    return Constraint(lambda values: all(value in choices for value in values), allowed, choices)


def _is_backend(name: str) -> bool:
    return name == "inductor" or name in list_backends(exclude_tags=())


_POSITIVE = Constraint(lambda value: value > 0, "above 0")
_FRACTION = Constraint(lambda value: 0 <= value <= 1, "between 0 and 1")
_FROM_0, _FROM_1 = _at_least(0), _at_least(1)
_ALL_OR_FROM_1 = Constraint(lambda value: value == -1 or value >= 1, "at least 1, or -1")
_FILE = Constraint(lambda value: value == "" or os.path.isfile(value), "the path of a file")

_LOADER = {"num_streams": _FROM_1, "seed": _FROM_0, "num_workers": _FROM_0, "prefetch_factor": _FROM_1}

# What TorchTitan leaves to chance or to an assertion while it trains, by table and key. None is always allowed.
CONSTRAINTS: dict[str, dict[str, Constraint]] = {
    "training": {
        "seq_len": _at_least(2),
        "steps": _FROM_1,
        "max_norm": _POSITIVE,
        "local_batch_size": _FROM_1,
        "global_batch_size": Constraint(_ALL_OR_FROM_1.holds, "at least 1"),
        "gc_freq": _FROM_1,
    },
    "lr_scheduler": {
        "warmup_steps": _FROM_0,
        "total_steps": _FROM_1,
        "decay_ratio": _FRACTION,
        "min_lr_factor": _FRACTION,
    },
    "metrics": {"log_freq": _FROM_1},
    "validator": {"freq": _FROM_1, "steps": _ALL_OR_FROM_1},
    "dataloader": _LOADER,
    "validator.dataloader": _LOADER,
    "loss": {"num_chunks": _FROM_1},
    "debug": {"seed": _FROM_0},
    "machine": {
        "num_ranks": _FROM_1,
        "device_memory_gib": Constraint(lambda value: 0 < value < 1e6, "above 0, below a million"),
    },
    "checkpoint": {
        "load_step": Constraint(lambda value: value >= -1, "a step, or -1 for the latest"),
        "exclude_from_loading": _list_of("optimizer", "lr_scheduler", "dataloader", "train_state"),
    },
    "compile": {
        "components": _list_of("model", "loss"),
        "backend": Constraint(
            _is_backend, "a backend of torch.compile", ("inductor", "eager", "aot_eager", "cudagraphs")
        ),
    },
    "activation_checkpoint": {"determinism_check": _one_of("default", "none"), "memory_budget": _FRACTION},
    "comm": {"init_timeout_seconds": _FROM_1, "train_timeout_seconds": _FROM_1, "trace_buf_size": _FROM_0},
    "profiler": {
        "profile_freq": _FROM_1,
        "profiler_repeat": _FROM_0,
        "profiler_skip_first": _FROM_0,
        "profiler_skip_first_wait": _FROM_0,
        "profiler_active": _FROM_1,
        "profiler_warmup": _FROM_0,
        "memory_snapshot_freq": _FROM_1,
        "memory_snapshot_max_entries": _FROM_1,
    },
    "parallelism": {
        "data_parallel_replicate_degree": _FROM_1,
        "data_parallel_shard_degree": _ALL_OR_FROM_1,
        "tensor_parallel_degree": _FROM_1,
        "context_parallel_degree": _FROM_1,
        "pipeline_parallel_degree": _FROM_1,
        "expert_parallel_degree": _FROM_1,
        "pipeline_parallel_first_stage_less_layers": _FROM_0,
        "pipeline_parallel_last_stage_less_layers": _FROM_0,
        "pipeline_parallel_layers_per_stage": _FROM_1,
        "pipeline_parallel_schedule": Constraint(_one_of(*SCHEDULES, *BASE_SCHEDULES).holds, *_one_of(*SCHEDULES)[1:]),
        "pipeline_parallel_schedule_csv": _FILE,
        "context_parallel_load_balancer": _one_of("headtail", "ptrr", "none"),
    },
}

OPTIMIZER_CONSTRAINTS = {
    "lr": _POSITIVE,
    "weight_decay": _FROM_0,
    "eps": _POSITIVE,
    "betas": Constraint(
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value), "two numbers from 0 to below 1"
    ),
}


def check_constraints(config) -> None:
    """Raise UserError for a setting of a ``Trainer.Config`` outside its range."""
    for table, key, value, default in _settings(config, ""):
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            _check_value(entry, table, key, default)
        if value is not None and key in CONSTRAINTS.get(table, {}):
            _check(CONSTRAINTS[table][key], value, table, key)
    schedule, steps = config.lr_scheduler.total_steps, config.training.steps
    if schedule is not None and schedule < steps:
        allowed = f"at least [training] steps = {steps}: after its end the schedule's learning rates are below 0"
        raise invalid("lr_scheduler", "total_steps", schedule, allowed)
    profiler = config.profiler
    if profiler.profile_freq < profiler.profiler_warmup + profiler.profiler_active:
        raise invalid("profiler", "profile_freq", profiler.profile_freq, "at least profiler_warmup + profiler_active")
    _check_optimizer(config.optimizer)


def _settings(section: Any, table: str) -> Iterator[tuple[str, str, Any, Any]]:
    """(table, key, value, default) of all settings, those of nested tables included."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.name == "model_spec":
            continue
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{table}.{field.name}" if table else field.name)
        else:
            yield table, field.name, value, field.default


def _check_value(value: Any, table: str, key: str, default: Any) -> None:
    """Constraints of all numbers and texts."""
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        limit = _LARGEST_SEED if key == "seed" else _LARGEST
        if abs(value) > limit:
            raise invalid(table, key, value, f"an integer of at most {limit:_}")
    elif isinstance(value, float):
        if not abs(value) <= _LARGEST_FLOAT32:
            raise invalid(table, key, value, f"a finite number of at most {_LARGEST_FLOAT32:.2g}")
    elif isinstance(value, str):
        if not value.strip() and value != default:
            raise invalid(table, key, value, "a text that is not empty")
        if any(ord(character) < 32 for character in value):
            raise invalid(table, key, value, "a text without control characters")


def _check_optimizer(optimizer) -> None:
    if not optimizer.param_groups:
        raise invalid("optimizer", "param_groups", [], "a list of at least one group")
    for group in optimizer.param_groups:
        # Others need settings that are Python objects.
        factories = optimizer.optimizer_factory_kwargs_by_name
        _check(_one_of("AdamW", "Adam", *factories), group.optimizer_name, "optimizer", "optimizer_name")
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise invalid("optimizer", "pattern", group.pattern, f"a regular expression ({error})") from None
        known = _kwargs(group.optimizer_name)
        for key, value in group.optimizer_kwargs.items():
            if known and key not in known:
                raise UserError(
                    f"[optimizer] {group.optimizer_name} has no setting '{key}'.{nearest_choice(key, known)}",
                    table="optimizer",
                    key="param_groups",
                )
            _check_value(value, "optimizer", key, None)
            if key in OPTIMIZER_CONSTRAINTS and value is not None:
                _check_kwarg(OPTIMIZER_CONSTRAINTS[key], value, key)


def _kwargs(optimizer: str) -> list[str]:
    """Settings of torch's optimizer of this name; none for TorchTitan's own."""
    found = getattr(optim, optimizer, None)
    return [name for name in inspect.signature(found).parameters if name != "params"] if found else []


def _check_kwarg(allowed: Constraint, value: Any, key: str) -> None:
    """As `_check`, for what has no type: TorchTitan passes it to torch's optimizer as it is."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, (list, tuple)) != (key == "betas") or not all(type(n) in (int, float) for n in numbers):
        raise invalid("optimizer", key, value, allowed.allowed)
    _check(allowed, value, "optimizer", key)


def _check(allowed: Constraint, value: Any, table: str, key: str) -> None:
    if not allowed.holds(value):
        raise invalid(table, key, value, allowed.allowed, allowed.choices)
