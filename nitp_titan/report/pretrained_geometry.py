"""Geometry of pretrained models on a page: tables, plots and the numbers themselves."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from nitp_titan.markdown import table
from nitp_titan.report.drawing import Drawing
from nitp_titan.report.folder import write_page
from nitp_titan.report.plots import COLORS

Stats = dict[str, Any]
"""Statistics of the states at a site, from `geometry.statistics.describe`."""


def _of_dim(key: str) -> Callable[[Stats], float]:
    # A spectrum ends at the last of all ranks.
    return lambda stats: stats[key] / stats["spectrum"]["rank"][-1]


def _plain(key: str) -> Callable[[Stats], float]:
    return lambda stats: stats[key]


# Row of the table of last hidden states -> getter and format of its value.
_ROWS = {
    "effective rank": (_plain("effective_rank"), ".2f"),
    "effective rank / dim": (_of_dim("effective_rank"), ".4f"),
    "RankMe": (_plain("rankme"), ".2f"),
    "RankMe / dim": (_of_dim("rankme"), ".4f"),
    "participation ratio": (_plain("participation_ratio"), ".2f"),
    "average cosine, all pairs": (_plain("cosine"), ".4f"),
    "average cosine, sampled pairs": (_plain("cosine_sampled"), ".4f"),
}
_BY_LAYER = ("effective rank", "average cosine, all pairs")
_BY_LAYER_OF_DIFFERENT_DIMS = ("effective rank", "effective rank / dim", "average cosine, all pairs")


def tables(result: dict[str, Any]) -> str:
    """Markdown tables of the last hidden states and of statistics by layer, with differences to the first model."""
    models = result["models"]
    names, others = [model["name"] for model in models], models[1:]
    columns = [*names, *(f"{other['name']} - {names[0]}" for other in others)]
    sizes = [
        [size, *(f"{model[size]:,}" for model in models), *("" for _ in others)]
        for size in ("tokens", "sequences", "dim")
    ]
    parts = [table(["last hidden state", *columns], sizes + [[row, *_cells(models, "hidden", row)] for row in _ROWS])]
    layers = [f"layer_{number}" for number in range(max(model["num_layers"] for model in models) + 1)]
    if any(layer in model["states"] for model in models for layer in layers):
        shown = _BY_LAYER if len({model["dim"] for model in models}) == 1 else _BY_LAYER_OF_DIFFERENT_DIMS
        for row in shown:
            parts.append(
                table([row, *columns], [[state, *_cells(models, state, row)] for state in [*layers, "hidden"]])
            )
    return "\n\n".join(parts)


def _cells(models: Sequence[dict[str, Any]], state: str, row: str) -> list[str]:
    """Value of every model, then the differences to the first; ``-`` without a value."""
    getter, spec = _ROWS[row]
    values = [getter(stats) if (stats := model["states"].get(state)) else None for model in models]
    first = values[0]
    differences = [None if value is None or first is None else value - first for value in values[1:]]
    cells = ["-" if value is None else f"{value:z{spec}}" for value in values]
    return cells + ["-" if value is None else f"{value:+z{spec}}" for value in differences]


def drawings(result: dict[str, Any]) -> list[Drawing]:
    """Effective rank and cosine by layer, and the spectrum of the last hidden states: those that were measured."""
    models = result["models"]
    caption = "Input of the first layer and output of every layer; open: the last hidden state, after the final norm."
    plots = []
    for stat, title, label in (
        ("effective_rank", "Effective rank by layer", "effective rank"),
        ("cosine", "Average cosine similarity by layer", "cosine, all pairs"),
    ):
        if any(model["states"] for model in models):
            plots.append(Drawing(f"layers_{stat}", title, caption, _by_layer(models, stat, label)))
    if any(_spectrum(model) for model in models):
        caption = "Covariance of the last hidden states."
        plots.append(Drawing("spectrum", "Spectrum of the last hidden state", caption, _spectra(models)))
    return plots


def _colored(models: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    return ((model, COLORS[index % len(COLORS)]) for index, model in enumerate(models))


def _by_layer(models: Sequence[dict[str, Any]], stat: str, label: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for model, color in _colored(models):
            states, numbers = model["states"], range(model["num_layers"] + 1)
            points = [(n, states[f"layer_{n}"][stat]) for n in numbers if f"layer_{n}" in states]
            if points:
                axes.plot(*zip(*points), color=color, marker="o", markersize=3.5, label=model["name"])
            if "hidden" in states:
                last, label_of_last = (model["num_layers"], states["hidden"][stat]), None if points else model["name"]
                style: dict[str, Any] = {
                    "marker": "D",
                    "markersize": 5.5,
                    "markerfacecolor": "none",
                    "linestyle": "none",
                }
                axes.plot(*last, color=color, label=label_of_last, **style)
        axes.set(xlabel="layer (0: embedding; open: final norm)", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # stub of the base class

    return draw


def _spectrum(model: dict[str, Any]) -> list[tuple[int, float]]:
    """Rank and share of the variance of the last hidden state's eigenvalues, those above zero."""
    spectrum = model["states"].get("hidden", {}).get("spectrum", {"rank": [], "share": []})
    return [(rank, share) for rank, share in zip(spectrum["rank"], spectrum["share"]) if share > 0]


def _spectra(models: Sequence[dict[str, Any]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for model, color in _colored(models):
            if points := _spectrum(model):
                axes.plot(*zip(*points), color=color, label=model["name"])
        axes.set(xscale="log", yscale="log", xlabel="eigenvalue, by rank", ylabel="share of the variance")

    return draw


def markdown(result: dict[str, Any]) -> str:
    """The page ``geometry.md``: tables, warnings, plots, settings."""
    settings, versions = result["settings"], result["versions"]
    names = [model["name"] for model in result["models"]]
    against = f"{', '.join(names[1:])} against {names[0]}" if len(names) > 1 else names[0]
    parts = [f"# Geometry of {against}", tables(result)]
    parts += ["**Warnings:**\n\n" + "\n".join(f"- {line}" for line in result["warnings"])] if result["warnings"] else []
    parts += [f"![{each.title}]({each.name}.png)\n\n{each.caption}" for each in drawings(result)]
    rows = [[model["name"], model["model"]] for model in result["models"]]
    rows += [[name, str(value)] for name, value in {**settings, **versions}.items()]
    return "\n\n".join([*parts, table(["setting", "value"], rows)]) + "\n"


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """Write ``geometry.json``, ``geometry.md``, every plot as PNG and SVG, and all in one ``geometry.png``.

    Returns:
        The files. They appear once all of them are complete.

    Raises:
        UserError: if they cannot be written.
    """
    return write_page(out, "geometry", text=markdown(result), data=as_json(result), drawings=drawings(result))


def as_json(result: dict[str, Any]) -> str:
    """The text of ``geometry.json``."""
    return json.dumps(result, indent=1, allow_nan=False)
