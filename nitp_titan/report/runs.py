"""Run folders as variants of a comparison: measurements, settings, and reasons why a comparison is not fair."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nitp_titan.config.tables import flat_settings
from nitp_titan.errors import UserError

Series = tuple[list[int], list[float]]

# Settings that name a run and do not change its results, and the seed.
_NAMES = ("dump_folder", "[metrics] run_name", "[metrics] run_group", "[debug] seed")
# Why variants do not compare fairly -> prefixes of settings in which they then differ. The parallelism is not among
# them: sequences and losses are those of one rank in every layout.
_UNFAIR = {
    "the variants may see other data or another order": ("[dataloader] ", "hf_assets_path", "[training] seq_len"),
    "at the same step the variants have seen different numbers of tokens": ("[training] global_batch_size",),
    "at the same step the variants are at different parts of the learning-rate schedule": ("[training] steps",),
    "more than NITP is compared": (
        "[model] family",
        "[model] flavor",
        "[optimizer] ",
        "[lr_scheduler] ",
        "[training] max_norm",
    ),
    "the variants may start from different weights": ("[checkpoint] initial_load",),
    "validation is not on the same tokens": ("[validator] dataloader.", "[validator] steps"),
    "validation geometry is not of the same tokens": ("[geometry] validation_batches",),
    "the variants compute in different precision": ("[training] mixed_precision", "[float8] ", "[training] dtype"),
}
# Settings of how data are read, which change neither the data nor their order.
_HARMLESS = ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor")


@dataclass(frozen=True)
class Run:
    """The content of a run folder, of a finished run or one that still trains."""

    folder: Path
    name: str
    records: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    geometry: list[dict[str, Any]]
    validation_geometry: list[dict[str, Any]]
    settings: dict[str, Any]
    """Every setting by its name (``[training] steps``); empty if the folder has no resolved.json."""

    problems: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int | None:
        return self.settings.get("[debug] seed")

    @property
    def last_step(self) -> int:
        return self.records[-1]["step"]

    @property
    def planned_steps(self) -> int | None:
        return self.settings.get("[training] steps")

    def series(self, key: str) -> Series:
        """Steps and values of a key of metrics.jsonl, where it was logged."""
        return _series(self.records, [key])

    def validation_series(self) -> Series:
        """Steps and validation NTP losses."""
        return _series(self.validation, ["ntp_loss"])

    def geometry_series(self, site: str, stat: str) -> Series:
        """Steps and values of a statistic of the states at a site, over training mini-batches."""
        return _series(self.geometry, [site, stat])

    def validation_geometry_series(self, site: str, stat: str) -> Series:
        """Steps and values of a statistic of the states at a site, over the fixed validation batches."""
        return _series(self.validation_geometry, [site, stat])


def _series(records: list[dict[str, Any]], path: Sequence[str]) -> Series:
    steps, values = [], []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (int, float)):
            steps.append(record["step"])
            values.append(float(value))
    return steps, values


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed only."""

    name: str
    runs: list[Run]

    @cached_property
    def settings(self) -> dict[str, Any]:
        return _without_names(self.runs[0].settings)

    @property
    def is_ntp(self) -> bool:
        """Whether NTP alone was trained."""
        weight = self.settings.get("[nitp] weight")
        return weight == 0 if weight is not None else not self.runs[0].series("nitp_loss")[1]


def read_variants(arguments: Iterable[str]) -> tuple[list[Variant], list[str]]:
    """Variants of ``[NAME=]FOLDER`` arguments, the baseline first, and a line for each file that could not be read.

    A folder without metrics.jsonl stands for the run folders in it. Runs with the same name, or without one and with
    the same settings but for the seed, are one variant.

    Raises:
        UserError: if no run can be read.
    """
    problems: list[str] = []
    groups: dict[tuple[str, str], list[Run]] = {}
    for argument in arguments:
        name, _, folder = argument.rpartition("=")
        for path in _run_folders(Path(folder), problems):
            run = _read_run(path, problems)
            if run is not None:
                alike = name or (_without_names(run.settings) if run.settings else str(path))
                groups.setdefault((name, json.dumps(alike)), []).append(run)
    if not groups:
        raise UserError("there is no run to compare. " + " ".join(problems))
    variants = _with_names([Variant(name, runs) for (name, _), runs in groups.items()])
    variants.sort(key=lambda variant: not variant.is_ntp)
    problems += [f"{run.folder}: {problem}" for variant in variants for run in variant.runs for problem in run.problems]
    return variants, problems


def _without_names(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _NAMES}


def _with_names(variants: list[Variant]) -> list[Variant]:
    """Variants without a name take that of their recipe, or of their folder where two share a recipe."""
    taken: set[str] = {variant.name for variant in variants if variant.name}
    named = []
    for variant in variants:
        run = variant.runs[0]
        recipe = str(run.settings.get("[metrics] run_name") or "").rpartition("/")[2]
        choices = [variant.name] if variant.name else [recipe, run.folder.name, str(run.folder)]
        name = next(choice for choice in choices if choice and (variant.name or choice not in taken))
        taken.add(name)
        named.append(Variant(name, variant.runs))
    return named


def _run_folders(folder: Path, problems: list[str]) -> list[Path]:
    if (folder / "metrics.jsonl").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/metrics.jsonl")) if folder.is_dir() else []
    if not found:
        reason = "has no metrics.jsonl; it is not the folder of a training run" if folder.is_dir() else "does not exist"
        problems.append(f"{folder} {reason}.")
    return found


def _read_run(folder: Path, problems: list[str]) -> Run | None:
    own: list[str] = []
    files = {
        name: _read_lines(folder / f"{name}.jsonl", own)
        for name in ("metrics", "validation", "geometry", "validation_geometry")
    }
    settings = _read_settings(folder / "resolved.json", own)
    if not files["metrics"]:
        problems.append(f"{folder}/metrics.jsonl holds no step; the run is left out.")
        return None
    run = Run(folder, folder.name, files.pop("metrics"), **files, settings=settings, problems=own)
    if run.planned_steps is not None and run.last_step < run.planned_steps:
        own.append(f"at step {run.last_step:,} of {run.planned_steps:,}; it is compared as far as it is.")
    return run


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Records of a metrics file, by step. Lines that are not records are left out, with a problem but for the last."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            damaged.append(number)
    if damaged:
        numbers = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        problems.append(
            f"{path.name}: {len(damaged)} of {len(lines)} lines are not records ({numbers}); they are left out."
        )
    return sorted(records, key=lambda record: record["step"])


def _read_settings(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return flat_settings(json.loads(path.read_text()))
    except FileNotFoundError:
        problems.append("no resolved.json: its settings are unknown.")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        problems.append("resolved.json is damaged: its settings are unknown.")
    return {}


@dataclass(frozen=True)
class ChangedSettings:
    """Settings in which the variants differ, with the value of each variant."""

    nitp: dict[str, list[Any]]
    others: dict[str, list[Any]]
    warnings: list[str]
    """Reasons why the comparison is not fair."""


def changed_settings(variants: Sequence[Variant]) -> ChangedSettings:
    """Settings in which variants differ, the seed aside, and what makes the comparison unfair."""
    known = [variant for variant in variants if variant.settings]
    keys = sorted({key for variant in known for key in variant.settings})
    by_key = {key: [variant.settings.get(key) for variant in known] for key in keys}
    changed = {key: values for key, values in by_key.items() if any(value != values[0] for value in values)}
    nitp = {key: values for key, values in changed.items() if key.startswith("[nitp] ")}
    others = {key: values for key, values in changed.items() if key not in nitp}
    warnings = []
    for reason, prefixes in _UNFAIR.items():
        if keys := [key for key in others if key.startswith(prefixes) and not key.endswith(_HARMLESS)]:
            warnings.append(f"{', '.join(keys)} differ{'s' if len(keys) == 1 else ''}: {reason}.")
    seeds = {variant.name: sorted(run.seed for run in variant.runs if run.seed is not None) for variant in known}
    if len({tuple(values) for values in seeds.values()}) > 1:
        texts = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in seeds.items())
        warnings.append(f"the seeds differ ({texts}): only runs with a seed in common are paired.")
    last = {run.last_step for variant in variants for run in variant.runs}
    if len(last) > 1:
        warnings.append(
            f"the runs are at steps {min(last):,} to {max(last):,}: values are compared at steps that all of them have."
        )
    if len(known) < len(variants):
        unknown = ", ".join(variant.name for variant in variants if not variant.settings)
        warnings.append(f"the settings of {unknown} are unknown: nothing says that the variants can be compared.")
    return ChangedSettings(nitp, others, warnings)


def common_steps(series: Iterable[Series]) -> list[int]:
    """Steps that all series have, the empty ones aside: only these can be compared."""
    measured = [set(steps) for steps, _ in series if steps]
    return sorted(set.intersection(*measured)) if measured else []
