"""Figures of a comparison, each as SVG that takes the colours of the page around it, and as PNG."""

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

from nitp_titan.report.runs import Arm, Run, Series
from nitp_titan.report.stats import mean, phases, smoothed

# Readable on white and on near-black; the first is the baseline's.
COLORS = ("#7f8794", "#e0662f", "#3b86c8", "#2e9e6b", "#b768b0", "#c79a1e", "#4fb0b8", "#c4505f")
# Stand-ins that become CSS in the SVG.
_INK, _GRID = "#010203", "#010204"
_CSS = {_INK: "currentColor", _GRID: "var(--grid)"}
_SIZE = (5.0, 3.3)
_SPECTRUM_STYLES = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True)
class Drawing:
    """One figure of the report."""

    name: str
    """Of its files."""

    title: str
    caption: str
    draw: Callable[[Axes], None]


def color(arms: Sequence[Arm], arm: Arm) -> str:
    """The arm's colour, the same in every figure."""
    return COLORS[arms.index(arm) % len(COLORS)]


def svg(drawing: Drawing) -> str:
    """The figure as an SVG element, without XML header, whose lines and texts follow the page's colours."""
    with pyplot.rc_context(_style(_INK, _GRID) | {"svg.fonttype": "none", "svg.hashsalt": drawing.name}):
        stream = io.StringIO()
        _figure(drawing).savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, css in _CSS.items():
        text = text.replace(stand_in, css)
    head, _, rest = text.partition(">")
    view_box = head.partition('viewBox="')[2].partition('"')[0]
    # Without a size of its own it fits the page.
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg class="chart" role="img" aria-label="{escape(drawing.title)}" viewBox="{view_box}" {names}>{rest}'


def write_overview(drawings: Sequence[Drawing], path: Path) -> None:
    """Write losses, effective rank and cosine, as far as they were measured, side by side as PNG."""
    shown = [drawing for name in _OVERVIEW for drawing in drawings if drawing.name == name]
    with pyplot.rc_context(_PRINTED):
        figure = matplotlib.figure.Figure(figsize=(_SIZE[0] * len(shown) * 0.8, _SIZE[1]), layout="constrained")
        for axes, drawing in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
            drawing.draw(axes)
            axes.set_title(drawing.title, fontsize=10, loc="left")
        axes.legend()
        figure.savefig(path, dpi=130)


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
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
    }


_PRINTED = _style("#1b1f24", "#d8dce2")
_OVERVIEW = ("ntp_loss", "nitp_loss", "effective_rank", "cosine")


def _figure(drawing: Drawing):
    figure = matplotlib.figure.Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    drawing.draw(axes)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    return figure


def _curves(arms: Sequence[Arm], of: Callable[[Run], Series], *, smooth: bool) -> Callable[[Axes], None]:
    """Mean of each arm's runs with the band from their smallest to their largest value."""

    def draw(axes: Axes) -> None:
        for index, arm in enumerate(arms):
            steps, rows = _aligned([of(run) for run in arm.runs])
            if not steps:
                continue
            line = [mean(column) for column in zip(*rows)]
            rows = [smoothed(row) for row in rows] if smooth else rows
            shade = color(arms, arm)
            if smooth and len(rows) == 1:
                axes.plot(steps, line, color=shade, alpha=0.25, linewidth=0.7)
            if len(rows) > 1:
                columns = list(zip(*rows))
                low, high = [min(column) for column in columns], [max(column) for column in columns]
                axes.fill_between(steps, low, high, color=shade, alpha=0.2, linewidth=0)
            # Arms may coincide: the first is drawn widest and below, so that it shows under the others.
            width = 1.5 + (1.5 if index == 0 and len(arms) > 1 else 0)
            points = {} if len(steps) > 1 else {"marker": "o"}
            line = smoothed(line) if smooth else line
            axes.plot(steps, line, color=shade, label=arm.name, linewidth=width, **points)
        axes.set_xlabel("step")

    return draw


def _aligned(series: Sequence[Series]) -> tuple[list[int], list[list[float]]]:
    """Values of several runs at the steps that all of them have."""
    tables = [dict(zip(*pair)) for pair in series if pair[0]]
    if not tables:
        return [], []
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return steps, [[table[step] for step in steps] for table in tables]


def _scaled(draw: Callable[[Axes], None], arms: Sequence[Arm], of: Callable[[Run], Series], label: str):
    """Look at the part after the steep start: the axis ends a little above the later values."""

    def scaled(axes: Axes) -> None:
        draw(axes)
        later = [v for arm in arms for run in arm.runs for v in of(run)[1][len(of(run)[1]) // 8 :] if math.isfinite(v)]
        if later:
            low, high = min(later), max(later)
            axes.set_ylim(low - 0.04 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9)
        axes.set_ylabel(label)

    return scaled


def _labelled(draw: Callable[[Axes], None], label: str, **limits) -> Callable[[Axes], None]:
    def labelled(axes: Axes) -> None:
        draw(axes)
        axes.set_ylabel(label)
        axes.set(**limits)

    return labelled


def _nitp_loss(arms: Sequence[Arm]) -> Callable[[Axes], None]:
    curves = _curves(arms, lambda run: run.series("nitp_loss"), smooth=True)

    def draw(axes: Axes) -> None:
        curves(axes)
        named = False
        for arm in arms:
            steps, rows = _aligned([run.series("nitp_loss") for run in arm.runs])
            marks = phases(steps, [mean(column) for column in zip(*rows)])
            if marks is None:
                continue
            for name in ("collapse", "hump", "end"):
                axes.plot(*marks[name], marker="o", markersize=4, color=color(arms, arm))
            for name in () if named else ("collapse", "hump"):
                axes.annotate(name, marks[name], textcoords="offset points", xytext=(5, 7), fontsize=8)
            named = True
        axes.set(ylabel="loss", ylim=(0, None))

    return draw


def _spectra(arms: Sequence[Arm], steps: Sequence[int]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for arm in arms:
            by_step = {record["step"]: record for record in arm.runs[0].geometry if _has_spectrum(record)}
            for step, style in zip(steps, _SPECTRUM_STYLES):
                if step not in by_step:
                    continue
                spectrum = by_step[step]["hidden"]["spectrum"]
                points = [(r, s) for r, s in zip(spectrum["rank"], spectrum["share"]) if s > 0]
                if points:
                    label = arm.name if style == _SPECTRUM_STYLES[0] else None
                    axes.plot(*zip(*points), color=color(arms, arm), linestyle=style, label=label, linewidth=1.3)
        axes.set(xscale="log", yscale="log", xlabel="eigenvalue, by rank", ylabel="share of the variance")

    return draw


def _has_spectrum(record: dict) -> bool:
    hidden = record.get("hidden")
    return isinstance(hidden, dict) and isinstance(hidden.get("spectrum"), dict)


def chosen_steps(arms: Sequence[Arm], wanted: Sequence[int] = ()) -> list[int]:
    """Steps whose spectra are drawn, latest first: the measured ones nearest to those wanted, or three over the run."""
    measured = [{record["step"] for record in arm.runs[0].geometry if _has_spectrum(record)} for arm in arms]
    common = sorted(set.intersection(*[steps for steps in measured if steps] or [set()]))
    if not common:
        return []
    wanted = wanted or (common[0], common[-1] / 4, common[-1])
    nearest = {min(common, key=lambda step: abs(step - target)) for target in wanted}
    return sorted(nearest, reverse=True)[: len(_SPECTRUM_STYLES)]


def _layers(arms: Sequence[Arm], figure: str, label: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for arm in arms:
            rows = [profile for run in arm.runs if (profile := _profile(run, figure))]
            numbers = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
            if numbers:
                line = [mean([row[number] for row in rows]) for number in numbers]
                low, high = ([pick(row[n] for row in rows) for n in numbers] for pick in (min, max))
                axes.fill_between(numbers, low, high, color=color(arms, arm), alpha=0.2, linewidth=0)
                axes.plot(numbers, line, color=color(arms, arm), marker="o", markersize=3.5, label=arm.name)
        axes.set(xlabel="layer (0 is the embedding)", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return draw


def _profile(run: Run, figure: str) -> dict[int, float]:
    """Layer -> figure at the last measurement of a run; empty if layers were not measured."""
    states = run.geometry[-1] if run.geometry else {}
    layers = {int(s.removeprefix("layer_")): v for s, v in states.items() if s.startswith("layer_") and figure in v}
    return {number: values[figure] for number, values in layers.items()}


def drawings(arms: Sequence[Arm], spectrum_steps: Sequence[int] = ()) -> list[Drawing]:
    """All figures that the runs have data for."""
    steps = chosen_steps(arms, spectrum_steps)
    lines = ", ".join(f"{style} at step {step:,}" for step, style in zip(steps, _SPECTRUM_STYLES))
    several = any(len(arm.runs) > 1 for arm in arms)
    band = " Line: mean over seeds; band: smallest to largest." if several else ""

    def curve(key: str) -> Callable[[Run], Series]:
        return lambda run: run.series(key)

    def geometry(state: str, figure: str) -> Callable[[Run], Series]:
        return lambda run: run.geometry_series(state, figure)

    def probe(figure: str) -> Callable[[Run], Series]:
        return lambda run: run.probe_series("hidden", figure)

    def has(of: Callable[[Run], Series]) -> bool:
        return any(of(run)[0] for arm in arms for run in arm.runs)

    ntp, validation = curve("ntp_loss"), Run.validation_series
    planned = [
        (
            has(ntp),
            "ntp_loss",
            "NTP loss",
            "Cross-entropy of the training mini-batches, moving average." + band,
            _scaled(_curves(arms, ntp, smooth=True), arms, ntp, "nats per token"),
        ),
        (
            has(validation),
            "validation_ntp_loss",
            "Validation NTP loss",
            "Cross-entropy of the validation data." + band,
            _scaled(_curves(arms, validation, smooth=False), arms, validation, "nats per token"),
        ),
        (
            has(curve("nitp_loss")),
            "nitp_loss",
            "NITP loss",
            "Moving average; dots mark the end of the collapse, the hump and the last step (Figure 5)." + band,
            _nitp_loss(arms),
        ),
        *(
            (
                has(geometry("hidden", figure)),
                figure,
                title,
                f"Last hidden states of the training mini-batches (Figure 1, App. D).{band}",
                _labelled(_curves(arms, geometry("hidden", figure), smooth=False), label),
            )
            for figure, title, label in (
                ("effective_rank", "Effective rank", "directions"),
                ("cosine", "Average cosine similarity", "cosine, all pairs"),
            )
        ),
        *(
            (
                has(probe(figure)),
                f"probe_{figure}",
                f"{title}, fixed tokens",
                f"Last hidden states of the same validation tokens in every arm.{band}",
                _labelled(_curves(arms, probe(figure), smooth=False), label),
            )
            for figure, title, label in (
                ("effective_rank", "Effective rank", "directions"),
                ("cosine", "Average cosine similarity", "cosine, all pairs"),
            )
        ),
        (
            has(geometry("target", "effective_rank")),
            "target_effective_rank",
            "Effective rank of the implicit target",
            "It drifts where gradients reach the target." + band,
            _labelled(_curves(arms, geometry("target", "effective_rank"), smooth=False), "directions"),
        ),
        (
            bool(steps),
            "spectra",
            "Eigenvalue spectrum",
            "Covariance of the last hidden states" + (", first seed of each arm: " if several else ": ") + lines + ".",
            _spectra(arms, steps),
        ),
        *(
            (
                any(_profile(run, figure) for arm in arms for run in arm.runs),
                f"layers_{figure}",
                title,
                "Output of every layer at the last measurement.",
                _layers(arms, figure, label),
            )
            for figure, title, label in (
                ("effective_rank", "Effective rank by layer", "directions"),
                ("cosine", "Cosine by layer", "cosine, all pairs"),
            )
        ),
        (
            has(curve("lr")),
            "learning_rate",
            "Learning rate",
            "The same line for every arm of a fair comparison.",
            _labelled(_curves(arms, curve("lr"), smooth=False), "learning rate"),
        ),
        (
            has(curve("tokens_per_second")),
            "throughput",
            "Throughput",
            "Tokens per second over all ranks, moving average." + band,
            _labelled(_curves(arms, curve("tokens_per_second"), smooth=True), "tokens/s", ylim=(0, None)),
        ),
        (
            has(curve("grad_norm")),
            "gradient_norm",
            "Gradient norm",
            "Before clipping, of NTP and NITP together; single steps." + band,
            _labelled(_curves(arms, curve("grad_norm"), smooth=False), "norm", yscale="log"),
        ),
    ]
    return [Drawing(*rest) for wanted, *rest in planned if wanted]
