"""A run folder holds one run: the same run resumes there, another one is refused.

A run is identified by its recipe and the content of its data. Everything else (parallelism, batch per rank,
intervals, precision, where the data lie) may change from start to start.
"""

import dataclasses
import hashlib
import json
import os
import uuid
from dataclasses import dataclass, field, replace
from datetime import datetime, UTC
from pathlib import Path
from typing import Any

import tomli
import tomli_w
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from nitp_titan.checkpoint.steps import complete_steps
from nitp_titan.checkpoint.stored import RESOLVED
from nitp_titan.config import recipe
from nitp_titan.config.build import tables_of
from nitp_titan.config.tables import changes, default_of, entries, Tables
from nitp_titan.errors import changes_text, first_few, UserError
from nitp_titan.files import append_line, archive, free_path, hold, LOCK, write_atomically
from nitp_titan.machine.credentials import redact
from nitp_titan.runs import provenance
from nitp_titan.runs.data_facts import compare, data_facts, with_documents
from nitp_titan.step_files import last_step, later_lines, set_damaged_aside, STEP_FILES

_DATA = "data.json"
_METRICS = "metrics.jsonl"
_STARTS = "starts.jsonl"
_SAVED = "last_checkpoint.json"
# Of [dataloader], how the data are read. All other keys decide what they are.
_READING = {"num_workers", "persistent_workers", "pin_memory", "prefetch_factor"}
# Known by content (`data_facts`), or by their effect.
_BY_CONTENT = {"dataset_path", "streaming", "hf_assets_path"}


@dataclass(frozen=True)
class ResumePlan:
    """How a start resumes what its folder holds; `plan_resume` makes it."""

    folder: Path
    from_step: int | None = None
    """Step of the run's own checkpoint that training resumes from; None for a run from its beginning."""

    archived: list[Path] = field(default_factory=list)
    """Folders of an older run that `claim` renames."""

    later: list[Path] = field(default_factory=list)
    """Checkpoints of steps after ``from_step``, which `claim` sets aside: these steps are trained again."""

    traces: str = ""
    """Subfolder that TorchTitan has made for this start already; it is made again when the old run is archived."""

    message: str = ""
    """Line for the log."""

    initial_load_path: str | None = None
    """The step that `[checkpoint] initial_load_path` names, for a run without checkpoints of its own."""

    finished: bool = False
    """Whether all steps are done, and the last checkpoint cannot be trained on."""

    data: dict[str, Any] | None = None
    """Facts on the data, see `data_facts`."""

    wandb_id: str = ""
    """Of the run in Weights & Biases, the same at every start."""

    def claim(self) -> None:
        """Lock the folder, set aside an older run, later steps and damaged lines; rank 0, after all have looked.

        Raises:
            UserError: if that cannot be done, or another process trains in the folder.
        """
        hold(self.folder)
        for path in self.archived:
            aside = archive(path)
            logger.warning(f"--overwrite: {path} is now {aside}")
            (aside / LOCK).unlink(missing_ok=True)
            if self.traces and (aside / self.traces).is_dir():
                (path / self.traces).mkdir(parents=True)
        try:
            self._set_damaged_aside()
            if self.later:
                self._set_later_aside()
        except OSError as error:
            raise UserError(f"{error.filename or self.folder} cannot be written: {error.strerror}.") from None
        if self.message:
            logger.info(self.message)

    def _set_damaged_aside(self) -> None:
        for path in (*_step_files(self.folder), self.folder / _STARTS):
            aside = set_damaged_aside(path, with_step=path.name != _STARTS)
            if aside is not None:
                logger.warning(f"{path} was damaged; the damaged part is now {aside}")

    def _set_later_aside(self) -> None:
        """Move what comes after ``from_step`` into ``<checkpoints>/set_aside``; a kill in between loses nothing."""
        place = free_path(self.later[0].parent / "set_aside" / f"after_step_{self.from_step}")
        place.mkdir(parents=True)
        for path in _step_files(self.folder):
            # The lines themselves are cut off when the metrics are resumed.
            if lines := later_lines(path, self.from_step):
                write_atomically(place / path.name, lines)
        if data := _read_data(self.folder):
            _write_data(place, data)
        # The newest last: until it is moved, a start without load_step resumes from it as before.
        for path in self.later:
            path.rename(place / path.name)
        if data:
            _write_data(self.folder, [one for one in data if one["first_step"] <= self.from_step])
        names = [path.name.removeprefix("step-") for path in (self.later[0], self.later[-1])]
        steps = f"steps {names[0]} to {names[1]}" if len(self.later) > 1 else f"step {names[0]}"
        logger.warning(f"load_step = {self.from_step}: the checkpoints of {steps} and later metrics are now in {place}")

    def write_start(self, config: Trainer.Config, *, documents: list[int | None] | None = None, **facts: Any) -> None:
        """Write ``resolved.toml``, ``resolved.json`` and a line of ``starts.jsonl``. For rank 0 alone.

        ``data.json`` tells of the data of the checkpoints; a run that resumes adds to it with its first checkpoint.

        Args:
            config: the ``NITPTrainer.Config`` that is recorded.
            documents: of every source of its data; None for a streamed one.
            facts: more to put down, for example the hosts.

        Raises:
            UserError: if the folder cannot be written.
        """
        before, tables = _read_resolved(self.folder), tables_of(config)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": provenance.command(),
            "job": _job(),
            **facts,
            "recipe": recipe_hash(tables),
            "code": provenance.code_hash(),
            "versions": provenance.versions(),
            "git": provenance.git(),
            "from_step": self.from_step,
            "wandb_id": self.wandb_id,
            # With the settings that are written now, those of every earlier start.
            "changed": {} if before is None else changes(before, tables),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            hold(self.folder)
            append_line(self.folder / _STARTS, redact(json.dumps(line)))
            if self.from_step is None:
                self._record_data(0, documents, before=[])
            write_resolved(config, self.folder)
        except OSError as error:
            raise UserError(f"{error.filename or self.folder} cannot be written: {error.strerror}.") from None

    def _record_data(self, step: int, documents: list[int | None] | None, before: list[dict[str, Any]]) -> None:
        """Put down that checkpoints from a step on are of the data of this start."""
        if self.data is None:
            return
        facts = with_documents(self.data, documents or [])
        if not before or before[-1]["facts"] != facts:
            _write_data(self.folder, [*before, {"first_step": step, "facts": facts}])

    def note_checkpoint(self, step: int, documents: list[int | None] | None = None) -> None:
        """Remember in the run folder that it has a checkpoint, and of what data. For rank 0 alone.

        Args:
            documents: as for `write_start`.
        """
        if self.from_step is not None:
            self._record_data(step, documents, _read_data(self.folder))
        write_atomically(self.folder / _SAVED, json.dumps({"step": step}) + "\n")


def plan_resume(config: Trainer.Config) -> ResumePlan:
    """Look at the run folder of a ``NITPTrainer.Config``; changes nothing there.

    Without a run the folder may hold anything, as a launcher's log. ``--resume`` without a run starts one: scripts may
    give it always. A restart of the same job (torchrun's ``--max-restarts``, Slurm's requeue) overwrites nothing.

    Raises:
        UserError: if the folder holds another run and no flag says what to do with it, naming what differs.
    """
    folder = Path(config.dump_folder)
    if config.resume and config.overwrite:
        raise UserError("--resume resumes a run and --overwrite starts it anew; give one of them.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"dump_folder = '{folder}' is a file.", table="", key="dump_folder")
    # A remote folder of checkpoints is TorchTitan's to look into.
    checkpoints = None if "://" in config.checkpoint.folder else folder / config.checkpoint.folder
    if config.overwrite and checkpoints is not None and config.checkpoint.load_step != -1:
        raise UserError("--overwrite starts without the step that --checkpoint.load_step names; give one of them.")
    steps = {} if checkpoints is None else complete_steps(checkpoints)
    given_id = os.environ.get("WANDB_RUN_ID")
    new = ResumePlan(folder, data=data_facts(config), wandb_id=given_id or uuid.uuid4().hex[:8])
    if config.overwrite:
        _check_overwrite(config, [place.resolve() for place in (folder, checkpoints) if place is not None], new.data)
    if not (steps or (folder / RESOLVED).exists() or (folder / _METRICS).exists()):
        return replace(new, message="--resume: there is no run yet, a new one starts" if config.resume else "")

    if config.overwrite and not (_restarted(folder) and _changed(config) == {}):
        return replace(new, archived=_places(folder, checkpoints), traces=config.comm.save_traces_folder)
    changed = _changed(config)
    none = not steps and checkpoints is not None
    if changed != {} and (none or not config.resume):
        raise UserError(_refusal(folder, changed, resume=config.resume, none=none))
    step = _step_to_load(config, steps)
    grown = _check_data(config, new.data, step, none=none)
    starts = read_starts(folder)
    again = replace(new, wandb_id=given_id or (starts and starts[-1].get("wandb_id")) or new.wandb_id)
    if checkpoints is None:
        return replace(again, message=f"{folder}: the run resumes from {config.checkpoint.folder}")
    if none:
        _check_nothing_lost(config, checkpoints)
        return replace(again, message=f"{folder}: the run had no checkpoint yet and starts again")
    if not config.checkpoint.enable:
        raise UserError(
            f"{folder} holds a run with checkpoints up to step {max(steps)}, and [checkpoint] enable = false would not "
            f"load them. Enable it to resume, {_WAYS_OUT}.",
            table="checkpoint",
            key="enable",
        )
    later = [] if config.checkpoint.load_only else [path for number, path in steps.items() if number > step]
    with_changed = f" with {changes_text(changed)}" if changed else ""
    message = "; ".join([f"{folder}: the run resumes from step {step}{with_changed}", *grown])
    if step in steps and step > config.training.steps:
        raise UserError(
            f"{folder}: the run has done {step} steps, and [training] steps = {config.training.steps}. Take more "
            f"steps, or an earlier checkpoint ([checkpoint] load_step), {_WAYS_OUT}.",
            table="training",
            key="steps",
        )
    if step == config.training.steps:
        message = f"{folder}: the run has done its {step} steps, nothing is left to train"
    # Weights & Biases takes no step twice: training again from an earlier step is another run there.
    wandb_id = new.wandb_id if later else again.wandb_id
    return replace(new, from_step=step, later=later, message=message, wandb_id=wandb_id)


def _step_to_load(config, steps: dict[int, Path]) -> int | None:
    """The checkpoint of a run folder that training resumes from; None if it is not known to have one."""
    step, folder = config.checkpoint.load_step, Path(config.dump_folder)
    # A restarted job resumes from what it has trained since.
    begun = _restarted(folder) and any(
        _is_of_job(start) and start.get("from_step") == step for start in read_starts(folder)
    )
    return max(steps, default=None) if step == -1 or begun else step


def _changed(config: Trainer.Config) -> dict[str, list[Any]] | None:
    """Settings that identify the run and differ from those of the run in the folder; None if its own are unknown.

    Raises:
        UserError: if the folder was written by a version whose tables had other names.
    """
    folder, tables = Path(config.dump_folder), tables_of(config)
    before = _read_resolved(folder)
    if before is None:
        return None
    if unknown := [table for table in before if isinstance(before[table], dict) and table not in tables]:
        raise UserError(
            f"{folder} holds a run of another version of nitp-titan: its {RESOLVED} has a table [{unknown[0]}] "
            f"(CHANGELOG.md has the new names). {_WAYS_OUT.capitalize()}."
        )
    return changes(identity(_with_defaults(before, config)), identity(tables))


def _check_overwrite(config, places: list[Path], data: dict[str, Any]) -> None:
    """Raise UserError if a folder that ``--overwrite`` may rename holds more than a run.

    Args:
        data: of the run, see `data_facts`.
    """
    needed = [("the working directory", Path.cwd()), ("this project", recipe.PROJECT), ("your home", Path.home())]
    needed.append(("hf_assets_path", Path(config.hf_assets_path)))
    if config.checkpoint.initial_load_path and "://" not in config.checkpoint.initial_load_path:
        needed.append(("[checkpoint] initial_load_path", Path(config.checkpoint.initial_load_path)))
    for table in data.keys() - {"tokenizer"}:
        for source in data[table]:
            needed += [(f"[{table}] dataset_path", Path(path)) for path, _ in source["files"]]
    for place in places:
        for what, path in needed:
            if path.resolve().is_relative_to(place):
                raise UserError(
                    f"--overwrite would rename {place}, in which {what} ({path}) lies. Choose another --dump_folder.",
                    table="",
                    key="dump_folder",
                )


def _check_data(config, now: dict[str, Any], step: int | None, *, none: bool) -> list[str]:
    """The changes of data that ``--resume`` allows, in words.

    Args:
        now: the data of this start, see `data_facts`.
        step: of the checkpoint that it resumes from; None if that is not known.

    Raises:
        UserError: if the data are not those of the run in the folder.
    """
    folder = Path(config.dump_folder)
    try:
        before = _data_of(folder, step)
        order = {key: getattr(config.dataloader, key, None) for key in ("shuffle", "num_streams")}
        found = compare(before, now, shuffle=bool(order["shuffle"]), num_streams=order["num_streams"] or 1)
    except (LookupError, TypeError, AttributeError, ValueError):
        if config.resume:
            return [f"its {_DATA} is missing or damaged, so that its data are not compared"]
        raise UserError(
            f"{folder} holds a run without a readable {_DATA}, so that its data may be others. "
            f"{_WAYS_OUT.capitalize()}, or resume the run all the same with --resume."
        ) from None
    begins_again = "dataloader" in config.checkpoint.exclude_from_loading
    if found.other and not (config.resume and begins_again and not none):
        way_out = "" if none else ", or let the new data begin: --resume --checkpoint.exclude_from_loading dataloader"
        raise UserError(
            f"{folder} holds a run on other data: {first_few(found.other)}. Restore them, {_WAYS_OUT}{way_out}."
        )
    if found.allowed and (none or not config.resume):
        way_out = "" if none else ", or resume all the same with --resume"
        differs = first_few(found.allowed)
        raise UserError(f"{folder} holds a run on other data: {differs}. {_WAYS_OUT.capitalize()}{way_out}.")
    if not begins_again or none:
        return found.allowed
    return [
        *found.allowed,
        f"{first_few(found.other)}: the data begin again" if found.other else "the data begin again",
    ]


def _check_nothing_lost(config, checkpoints: Path) -> None:
    """Raise UserError if a run without checkpoints cannot start again as if it had just begun."""
    folder = Path(config.dump_folder)
    # Those of the run, which are of no other recipe.
    settings = (_read_resolved(folder) or {}).get("checkpoint", {})
    logged = last_step(folder / _METRICS)
    # While a step is written in the background, later ones are trained.
    first = settings.get("interval", 0) * (1 if settings.get("async_mode") == "disabled" else 2)
    had_one = (folder / _SAVED).exists() or any(start.get("from_step") for start in read_starts(folder))
    if had_one or (settings.get("enable") and logged > first):
        raise UserError(
            f"{folder} holds a run that has logged step {logged} and had checkpoints, and {checkpoints} holds none. "
            f"Bring them back, {_WAYS_OUT}."
        )
    if not settings.get("enable") and logged >= config.training.steps:
        raise UserError(
            f"{folder} holds a finished run of {logged} steps without checkpoints, which would start again. "
            f"{_WAYS_OUT.capitalize()}."
        )


_WAYS_OUT = "choose another --dump_folder, or set the old run aside with --overwrite"


def _refusal(folder: Path, changed: dict | None, *, resume: bool, none: bool) -> str:
    if changed is None:
        differs = f"{folder} holds a run without a readable {RESOLVED}, so that it may be of another recipe"
    else:
        differs = f"{folder} holds another run: {changes_text(changed)}"
    if none:
        no_use = "; there is no checkpoint to resume from" if resume else ""
        return f"{differs}{no_use}. {_WAYS_OUT.capitalize()}."
    return f"{differs}. {_WAYS_OUT.capitalize()}, or resume the run all the same with --resume."


def identity(tables: Tables) -> Tables:
    """Of the settings of a run, those that say what is trained and on what data, which are known by content."""
    kept: Tables = {}
    for table, key, value in entries(tables):
        if recipe.is_recipe_key(table, key) or (table == "dataloader" and key not in _READING):
            if key == "sources":
                value = [{k: v for k, v in source.items() if k not in _BY_CONTENT} for source in value]
            if key not in _BY_CONTENT:
                kept.setdefault(table, {})[key] = value
    return kept


def recipe_hash(tables: Tables) -> str:
    """sha256 of what identifies a run."""
    canonical = json.dumps(identity(tables), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _step_files(folder: Path) -> list[Path]:
    return [folder / f"{name}.jsonl" for name in STEP_FILES]


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


def _read_data(folder: Path) -> list[dict[str, Any]]:
    """``[{"first_step", "facts"}, ...]`` of ``data.json``: the data of the checkpoints from a step on, in order.

    Empty if the file is missing or damaged.
    """
    try:
        found = json.loads((folder / _DATA).read_text(encoding="utf-8"))
        return found if all(isinstance(one["first_step"], int) and one["facts"] for one in found) else []
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _write_data(folder: Path, data: list[dict[str, Any]]) -> None:
    write_atomically(folder / _DATA, json.dumps(data, indent=1) + "\n")


def _data_of(folder: Path, step: int | None) -> dict[str, Any]:
    """The data of a checkpoint, of the newest one for None; IndexError if they are unknown."""
    return [one["facts"] for one in _read_data(folder) if step is None or one["first_step"] <= step][-1]


def _read_resolved(folder: Path) -> Tables | None:
    try:
        tables = tomli.loads((folder / RESOLVED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tables if tables.pop("resolved", False) is True else None


def write_resolved(config: Trainer.Config, folder: Path) -> None:
    """Write ``resolved.toml`` (can be trained again) and ``resolved.json`` into a run folder."""
    tables = tables_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    head = "# The resolved configuration of a run; torchrun ... -m nitp_titan.train --recipe <this file>\n"
    write_atomically(folder / RESOLVED, head + tomli_w.dumps({"resolved": True, **tables}))
    write_atomically(folder / "resolved.json", json.dumps(tables, indent=2) + "\n")


def _with_defaults(tables: Tables, config) -> Tables:
    """A run of an older version lacks the settings that came later, and had what is their default."""
    filled = dict(tables)
    for name in {*recipe.RECIPE_KEYS, "dataloader"} & {each.name for each in dataclasses.fields(config)}:
        defaults = {each.name: default_of(each) for each in dataclasses.fields(getattr(config, name))}
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
    """Identity of this job, the same after a restart."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")


def _restarted(folder: Path) -> bool:
    """Whether this job has started the folder's run before and is started again after a fault."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    starts = read_starts(folder)
    return any(number not in ("", "0") for number in counts) and bool(starts) and _is_of_job(starts[-1])


def _is_of_job(start: dict[str, Any]) -> bool:
    return start.get("job") == _job()
