"""A run folder holds one run: the same run goes on there, another one is refused. Imports no torch.

What identifies a run is what its recipe says and what its data are. Everything else (parallelism, batch per rank,
intervals, precision) may change from start to start.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import socket
from dataclasses import dataclass, field
from datetime import datetime, UTC
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import tomli

from nitp_titan import recipe
from nitp_titan.checkpoint.steps import complete_steps
from nitp_titan.config import shown, UserError
from nitp_titan.run import provenance
from nitp_titan.run.credentials import redact

logger = logging.getLogger()

_RESOLVED = "resolved.toml"
_METRICS = "metrics.jsonl"
_STARTS = "starts.jsonl"
_LOCK = "run.lock"
# Of [dataloader], how the data are read. All other keys decide what they are.
_READING = {"num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "streaming"}
# TorchTitan's, whose files have the time in their names.
_TRACES = "structured_logs"

Tables = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """How a start goes on with what its folder holds; `find_start` makes it."""

    folder: Path
    from_step: int | None = None
    """Step of the run's own checkpoint that training goes on from."""

    set_aside: list[Path] = field(default_factory=list)
    """Folders of an older run that `settle` renames."""

    traces: tuple[str, ...] = ()
    """Folders in them that TorchTitan has begun to use for this start, before a trainer was built."""

    message: str = ""
    """What the log says of it."""

    def settle(self) -> None:
        """Set an older run aside. For rank 0 alone, once all ranks have looked.

        Raises:
            UserError: if that cannot be done, or another process trains in the folder.
        """
        _hold(self.folder)
        for path in self.set_aside:
            aside = set_aside(path)
            logger.warning(f"--overwrite: {path} is now {aside}")
            (aside / _LOCK).unlink(missing_ok=True)
            for name in self.traces:
                if (aside / name).is_dir():
                    path.mkdir(exist_ok=True)
                    (aside / name).rename(path / name)
        if self.message:
            logger.info(self.message)

    def record(self, config, **facts: Any) -> None:
        """Write ``resolved.toml``, ``resolved.json`` and a line of ``starts.jsonl``. For rank 0 alone.

        Args:
            config: the ``NITPTrainer.Config`` that is trained.
            facts: more to put down, for example the hosts.

        Raises:
            UserError: if the folder cannot be written.
        """
        from nitp_titan import schema

        before, now = _read_resolved(self.folder), schema.to_tables(config)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": provenance.command(),
            "job": _job(),
            **facts,
            "recipe": recipe_hash(now),
            "code": provenance.code_hash(),
            "versions": provenance.versions(),
            "git": provenance.git(),
            "from_step": self.from_step,
            # With the settings that are written now, those of every earlier start.
            "changed": {} if before is None else changes(before, now),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _hold(self.folder)
            _append_line(self.folder / _STARTS, redact(json.dumps(line)))
            recipe.write_resolved(config, self.folder)
        except OSError as error:
            raise UserError(f"{error.filename or self.folder} cannot be written: {error.strerror}.") from None


def find_start(config) -> Start:
    """Look at the run folder of a ``NITPTrainer.Config``; changes nothing there.

    Without a run the folder may hold anything, as a launcher's log. ``--resume`` without a run starts one: scripts may
    give it always. A restart of the same job (torchrun's ``--max-restarts``, Slurm's requeue) overwrites nothing.

    Raises:
        UserError: if the folder holds another run and no flag says what to do with it, naming what differs.
    """
    from nitp_titan import schema

    folder = Path(config.dump_folder)
    if config.resume and config.overwrite:
        raise UserError("--resume goes on with a run and --overwrite starts it anew; give one of them.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"dump_folder = '{folder}' is a file.", table="", key="dump_folder")
    # A remote folder of checkpoints is TorchTitan's to look into.
    checkpoints = None if "://" in config.checkpoint.folder else folder / config.checkpoint.folder
    steps = [] if checkpoints is None else list(complete_steps(checkpoints))
    if not (steps or (folder / _RESOLVED).exists() or (folder / _METRICS).exists()):
        return Start(folder, message="--resume: there is no run yet, a new one starts" if config.resume else "")

    before, now = _read_resolved(folder), schema.to_tables(config)
    changed = None if before is None else changes(identity(_with_defaults(before, config)), identity(now))
    if config.overwrite and not (changed == {} and _restarted(folder)):
        traces = (_TRACES, config.comm.save_traces_folder)
        return Start(folder, set_aside=_places(folder, checkpoints), traces=traces)
    none = not steps and checkpoints is not None
    if changed != {} and (none or not config.resume):
        raise UserError(_refusal(folder, changed, resume=config.resume, none=none))
    if checkpoints is None:
        return Start(folder, message=f"{folder}: the run goes on from {config.checkpoint.folder}")
    if none:
        return Start(folder, message=f"{folder}: the run had no checkpoint yet and starts again")
    if not config.checkpoint.enable:
        raise UserError(
            f"{folder} holds a run with checkpoints up to step {max(steps)}, and [checkpoint] enable = false would not "
            f"load them. Enable it to go on, {_WAYS_OUT}.",
            table="checkpoint",
            key="enable",
        )
    step = config.checkpoint.load_step if config.checkpoint.load_step != -1 else max(steps)
    said = f" with {_shown(changed)}" if changed else ""
    return Start(folder, from_step=step, message=f"{folder}: the run goes on from step {step}{said}")


_WAYS_OUT = "choose another --dump_folder, or set the old run aside with --overwrite"


def _refusal(folder: Path, changed: dict | None, *, resume: bool, none: bool) -> str:
    if changed is None:
        differs = f"{folder} holds a run without a readable {_RESOLVED}, so that it may be of another recipe"
    else:
        differs = f"{folder} holds another run: {_shown(changed)}"
    if none:
        no_use = "; there is no checkpoint to resume from" if resume else ""
        return f"{differs}{no_use}. {_WAYS_OUT.capitalize()}."
    return f"{differs}. {_WAYS_OUT.capitalize()}, or go on with the run all the same with --resume."


def identity(tables: Tables) -> Tables:
    """Of the settings of a run, those that say what is trained and on what data."""
    kept: Tables = {}
    for table, key, value in recipe.entries(tables):
        if recipe.is_recipe_key(table, key) or (table == "dataloader" and key not in _READING):
            kept.setdefault(table, {})[key] = value
    return kept


def recipe_hash(tables: Tables) -> str:
    """sha256 of what identifies a run."""
    canonical = json.dumps(identity(tables), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def named(tables: Tables) -> dict[str, Any]:
    """Every single setting by the name that messages give it: ``[training] steps``, ``[optimizer] lr``."""
    found: dict[str, Any] = {}
    for table, key, value in recipe.entries(tables):
        if table:
            _add_leaves(found, f"[{table}] {key}", value)
        else:
            _add_leaves(found, key, value)
    one_group = not any("param_groups[1]" in name for name in found)
    prefix = "param_groups[0].optimizer_kwargs."
    return {name.replace(prefix, "") if one_group else name: value for name, value in found.items()}


def _add_leaves(found: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            _add_leaves(found, f"{name}.{key}" if name else key, entry)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for index, entry in enumerate(value):
            _add_leaves(found, f"{name}[{index}]", entry)
    else:
        found[name] = value


def changes(before: Tables, now: Tables) -> dict[str, list[Any]]:
    """Settings that differ, by name, as ``[before, now]``; None stands for one that is not there."""
    return changed_values(named(before), named(now))


def changed_values(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """Entries that differ, as ``[old, new]``; None stands for one that is not there."""
    names = [*old, *(name for name in new if name not in old)]
    return {name: [old.get(name), new.get(name)] for name in names if old.get(name) != new.get(name)}


def listed(parts: list[str], most: int = 3) -> str:
    """The first few of some findings and how many more there are, as one line."""
    more = f"; and {len(parts) - most} more" if len(parts) > most else ""
    return "; ".join(parts[:most]) + more


def _shown(changed: dict[str, list[Any]]) -> str:
    return listed([f"{name}: {shown_setting(old)} -> {shown_setting(new)}" for name, (old, new) in changed.items()])


def shown_setting(value: Any) -> str:
    """A setting's value in a message; None is one that is not there."""
    return "not set" if value is None else shown(value)


def set_aside(path: Path) -> Path:
    """Rename a folder to ``<path>.1``, or the next number that is free; returns the new path.

    Raises:
        UserError: with the reason, if the folder cannot be renamed.
    """
    aside = next(other for n in count(1) if not (other := path.with_name(f"{path.name}.{n}")).exists())
    try:
        return path.rename(aside)
    except OSError as error:
        raise UserError(f"{path} cannot be renamed to {aside}: {error.strerror}.") from None


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``starts.jsonl``, the first start first; lines that a crash damaged are left out."""
    found = []
    path = folder / _STARTS
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in found if isinstance(entry, dict)]


# Locks of this process; one is lost when its file is closed, also after it was opened again.
_held: dict[Path, TextIO] = {}


def _hold(folder: Path) -> None:
    """Keep other processes out of a folder, if there is one, as long as this one lives.

    torchrun that is killed leaves its ranks behind, which train on; they would write into the same checkpoints.
    """
    path, held = folder / _LOCK, _held.get(folder.resolve())
    if not folder.is_dir() or (held and path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat())):
        return
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(f"{folder} is in use: {holder} trains there. End it first.") from None
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error.strerror}): start one run there at a time.")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[folder.resolve()] = file


def _append_line(path: Path, text: str) -> None:
    with path.open("a+b") as file:
        # A line that a crash cut short ends here.
        file.seek(max(file.tell() - 1, 0))
        cut = file.read(1) not in (b"", b"\n")
        file.write((b"\n" if cut else b"") + text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read_resolved(folder: Path) -> Tables | None:
    try:
        tables = tomli.loads((folder / _RESOLVED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tables if tables.pop("resolved", False) is True else None


def _with_defaults(tables: Tables, config) -> Tables:
    """A run of an older version lacks the settings that came later, and had what is their default."""
    filled = dict(tables)
    for name in {*recipe.RECIPE_KEYS, "dataloader"} & {each.name for each in dataclasses.fields(config)}:
        defaults = {
            each.name: each.default_factory() if each.default is dataclasses.MISSING else each.default
            for each in dataclasses.fields(getattr(config, name))
        }
        plain = {key: "none" if value is None else value for key, value in defaults.items()}
        filled[name] = plain | tables.get(name, {})
    return filled


def _places(folder: Path, checkpoints: Path | None) -> list[Path]:
    """The folders that make up a run."""
    if checkpoints is None:
        raise UserError(
            "--overwrite cannot set checkpoints in a remote folder aside; choose another [checkpoint] folder.",
            table="checkpoint",
            key="folder",
        )
    # Of a link, the folder that it names.
    folder, checkpoints = folder.resolve(), checkpoints.resolve()
    places = [folder] if checkpoints.is_relative_to(folder) else [checkpoints, folder]
    return [path for path in places if path.is_dir()]


def _job() -> str | None:
    """What tells this job from others, and its restarts do not change."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")


def _restarted(folder: Path) -> bool:
    """Whether this job has started the folder's run before and is started again after a fault."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    starts = read_starts(folder)
    return any(number not in ("", "0") for number in counts) and bool(starts) and starts[-1].get("job") == _job()
