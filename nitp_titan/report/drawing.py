"""Plots as SVG in the colours of the page around it, and as files."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

# Colours that become CSS in the SVG.
_INK, _GRID = "#010203", "#010204"
_CSS = {_INK: "currentColor", _GRID: "var(--grid)"}
_SIZE = (5.0, 3.5)
# Inches. On a page of this width, letters of 9 points are as large as the text around them.
_OVERVIEW_WIDTH = 9.0


@dataclass(frozen=True)
class Drawing:
    """One plot.

    Args:
        name: of its files, without ending.
        title: above the plot.
        caption: below it, in sentences.
        draw: draws into axes; the legend is made of the labels.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Axes], None]


def svg(drawing: Drawing) -> str:
    """The plot as an SVG element, without XML header, whose lines and texts follow the page's colours."""
    with pyplot.rc_context(_style(_INK, _GRID) | {"svg.fonttype": "none", "svg.hashsalt": drawing.name}):
        stream = io.StringIO()
        _figure(drawing).savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for ink, css in _CSS.items():
        text = text.replace(ink, css)
    head, _, rest = text.partition(">")
    view_box = head.partition('viewBox="')[2].partition('"')[0]
    # Without a size of its own it fits the page.
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg class="chart" role="img" aria-label="{escape(drawing.title)}" viewBox="{view_box}" {names}>{rest}'


def write_overview(drawings: Sequence[Drawing], path: Path) -> None:
    """Write plots as one PNG with one legend, two or three in a row: that many are readable in a column of text."""
    columns = min(len(drawings), 3 if len(drawings) % 3 == 0 else 2)
    rows = math.ceil(len(drawings) / columns)
    with pyplot.rc_context(_PRINTED):
        size = (_OVERVIEW_WIDTH, 0.3 + 0.7 * rows * _OVERVIEW_WIDTH / columns)
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).flat
        for axes, drawing in zip(places, drawings):
            drawing.draw(axes)
            axes.set_title(drawing.title, fontsize=10, loc="left")
        for axes in places:
            axes.remove()
        _add_legend(figure)
        figure.savefig(path, dpi=180)


def write_files(drawing: Drawing, folder: Path) -> None:
    """Write ``<name>.png`` and ``<name>.svg``, black on white."""
    with pyplot.rc_context(_PRINTED | {"svg.hashsalt": drawing.name}):
        figure = _figure(drawing)
        figure.axes[0].set_title(drawing.title, fontsize=10, loc="left")
        figure.savefig(folder / f"{drawing.name}.png", dpi=160)
        figure.savefig(folder / f"{drawing.name}.svg", metadata={"Date": None})


def _style(ink: str, grid: str) -> dict:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, ink),
        "grid.color": grid,
        "axes.grid": True,
        # Below bars as well as lines.
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
    }


_PRINTED = _style("#1b1f24", "#d8dce2")


def _figure(drawing: Drawing):
    figure = matplotlib.figure.Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    drawing.draw(axes)
    _add_legend(figure)
    return figure


def _add_legend(figure) -> None:
    """One legend of all axes below them, where it covers no curve."""
    pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels())]
    if named := {label: handle for handle, label in reversed(pairs)}:
        labels = list(dict.fromkeys(label for _, label in pairs))
        handles = [named[label] for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
