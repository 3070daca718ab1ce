"""The project's recipes as a catalogue: description, differences of two, the machines they are meant for.

Imports no torch, so that listing and comparing take no time.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nitp_titan.config import recipe
from nitp_titan.config.tables import changes, Tables
from nitp_titan.errors import UserError
from nitp_titan.objectives.settings import NITPConfig

_LABEL = re.compile(r"# (Source|Run|Cost|Expect): +(.*)")
LABELS = ("Source", "Run", "Cost", "Expect")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One recipe of the project, from its file alone."""

    name: str
    model: str
    objective: str
    tokens: int
    steps: int
    source: str


def header(path: Path) -> dict[str, str]:
    """The labelled lines of a recipe's head comment: Source, Run, Cost and Expect.

    The continuation of a line is indented; a backslash at the end of a line is dropped.
    """
    labelled: dict[str, str] = {}
    label = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        match = _LABEL.match(line)
        if match:
            label, labelled[match[1]] = match[1], match[2]
        elif label and line.startswith("#    "):
            labelled[label] = f"{labelled[label].removesuffix(' ' + chr(92))} {line[1:].strip()}"
        else:
            label = None
    return labelled


def entry(name: str) -> Entry:
    """The catalogue's entry of a recipe, by name or path; UserError if its file is wrong."""
    path = recipe.find(name, "recipes")
    tables = recipe.read_recipe(path).tables
    training = tables["training"]
    return Entry(
        name=name,
        model=f"{tables['model']['family']} {tables['model']['flavor']}",
        objective=objective(tables.get("nitp", {})),
        tokens=training["steps"] * training["global_batch_size"] * training["seq_len"],
        steps=training["steps"],
        source=header(path).get("Source", "-"),
    )


def objective(nitp: dict[str, Any]) -> str:
    """``ntp``, or ``nitp`` with weight, target layer and the settings that are not the paper's defaults."""
    if not nitp.get("weight"):
        return "ntp"
    if nitp.get("objective") == "cosine_regularizer":
        return f"cosine regularizer, weight {nitp['weight']:g}"
    others = [f"{key} {value}" for key, value in nitp.items() if key not in ("weight", "target_layer")]
    return ", ".join([f"nitp {nitp['weight']:g} @ {nitp.get('target_layer')}", *others])


def machines_for(name: str) -> list[str]:
    """Train configs that say they are meant for a recipe (``[machine] intended_recipes``)."""
    return [
        train_config
        for train_config in recipe.available("train_configs")
        if any(fnmatch.fnmatch(name, pattern) for pattern in _patterns(train_config))
    ]


def _patterns(train_config: str) -> list[str]:
    machine = recipe.read_toml(recipe.find(train_config, "train_configs")).get("machine", {})
    return machine.get("intended_recipes", [])


def difference(left: Tables, right: Tables) -> dict[str, list[Any]]:
    """Settings that differ between two sets of tables, by name (``[training] steps``), as ``[left, right]``.

    A setting that only one side has is None on the other, or its default in ``[nitp]``.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(NITPConfig)}
    left, right = ({**tables, "nitp": defaults | tables.get("nitp", {})} for tables in (left, right))
    return dict(sorted(changes(left, right).items()))


def pairs(name: str | None, train_config: str | None) -> list[tuple[Path, Path]]:
    """Recipes to check, each with a train config: the ones named, or all that are meant for each other.

    Raises:
        UserError: if no train config is meant for the recipe, or a file does not exist.
    """
    names = recipe.available("recipes") if name is None else [name]
    if train_config is not None:
        # Before anything heavy is imported.
        recipe.read_toml(recipe.find(train_config, "train_configs"))
    checks = []
    for each in names:
        path = recipe.find(each, "recipes")
        recipe.read_toml(path)
        machines = [train_config] if train_config else machines_for(_short_name(path))
        if not machines:
            raise UserError(
                f"{path}: no train config is meant for it ([machine] intended_recipes); name one: "
                f"{', '.join(recipe.available('train_configs'))}."
            )
        checks += [(path, recipe.find(machine, "train_configs")) for machine in machines]
    return checks


def _short_name(path: Path) -> str:
    folder = recipe.PROJECT / "recipes"
    path = path.resolve()
    return str(path.relative_to(folder).with_suffix("")) if path.is_relative_to(folder) else str(path)


def billions(tokens: int) -> str:
    """Tokens in billions, or in millions below a tenth of one."""
    return f"{tokens / 1e9:.1f}B" if tokens >= 1e8 else f"{tokens / 1e6:.1f}M"


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows as columns, the first row as their head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def report(result: dict[str, Any]) -> str:
    """A result of `meta_check.check` as text."""
    head = f"{result['recipe']} on {result['train_config']}"
    effort = f"({result['seconds']:.1f} s, {result['memory_gib']:.1f} GiB)"
    if "error" in result:
        return f"{head}: FAILED {effort}\n  {result['error']}\n"
    gib = {name: size / 2**30 for name, size in result["rank_bytes"].items()}
    nitp = f"; NITP adds {result['nitp_flops'] / 1e9:.3f}G = {result['nitp_overhead']:.1%}" if result["nitp"] else ""
    hours = result["device_hours"]
    lines = [
        ("source", header(Path(result["recipe"])).get("Source", "-")),
        (
            "model",
            f"{result['model']}: {result['parameters'] / 1e9:.3f}B parameters, "
            f"{result['activated_parameters'] / 1e9:.3f}B activated, "
            f"{result['projector_parameters'] / 1e6:.1f}M in the projector",
        ),
        ("FLOPs/token", f"{result['flops'] / 1e9:.3f}G, attention {result['attention_flops'] / 1e9:.3f}G{nitp}"),
        (
            "tokens",
            f"{result['steps']:,} steps x {result['global_batch_size']:,} sequences x {result['seq_len']:,} = "
            f"{billions(result['tokens'])}",
        ),
        (
            "batch",
            f"{result['global_batch_size']:,} = {result['local_batch_size']} per rank x "
            f"{result['data_parallel_ranks']} data-parallel ranks x {result['accumulation_steps']} accumulated",
        ),
        (
            "memory",
            f"{result['rank_parameters'] / 1e6:,.1f}M parameters per rank of {result['ranks']}: "
            f"{gib['total']:.2f} GiB of states (weights {gib['parameters']:.2f}, gradients {gib['gradients']:.2f}, "
            f"optimizer {gib['optimizer']:.2f}), before activations",
        ),
        ("cost", "-" if hours is None else f"about {hours:,.0f} {result['device']}-hours at 40% of peak (assumed)"),
    ]
    if result["note"] is not None:
        lines.append(("note", result["note"]))
    return "\n".join([f"{head}: ok {effort}", *(f"  {label:<12}{text}" for label, text in lines), ""])


_BEGIN, _END = "<!-- recipes: python scripts/recipe.py table -->\n", "<!-- end of recipes -->\n"
_HEAD = """\
| recipe | model | size | activated | tokens | steps | objective | overhead | expect | meant for |
|---|---|---:|---:|---:|---:|---|---:|---|---|
"""


def readme(text: str, counts_of: Callable[[Path, Path], Any]) -> str:
    """Text of recipes/README.md with its table of all recipes written anew.

    Args:
        text: of recipes/README.md.
        counts_of: gives the `Counts` of a recipe on a train config.
    """
    rows = []
    for name in recipe.available("recipes"):
        path, item, machines = recipe.find(name, "recipes"), entry(name), machines_for(name)
        counts = counts_of(path, recipe.find(machines[0], "train_configs"))
        overhead = f"{counts.nitp_overhead:.1%}" if counts.nitp_flops else "-"
        cells = [
            f"[{name}]({name}.toml)",
            item.model,
            _size(counts.parameters),
            _size(counts.activated_parameters),
            billions(item.tokens),
            f"{item.steps:,}",
            item.objective,
            overhead,
            header(path).get("Expect", "-"),
            ", ".join(machines),
        ]
        rows.append(f"| {' | '.join(cells)} |\n")
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    return "".join([before, _BEGIN, _HEAD, *rows, _END, after])


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.3f}B" if parameters >= 1e8 else f"{parameters / 1e6:.1f}M"
