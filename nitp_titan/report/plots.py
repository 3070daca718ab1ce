"""The plots of a comparison."""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter

from nitp_titan.report.drawing import Drawing
from nitp_titan.report.runs import (
    common_steps,
    Run,
    Series,
    Variant,
)
from nitp_titan.report.stats import phases, smoothed

# Readable on white and on near-black; the first is the baseline's.
COLORS = ("#7f8794", "#e0662f", "#3b86c8", "#2e9e6b", "#b768b0", "#c79a1e", "#4fb0b8", "#c4505f")
_SPECTRUM_STYLES = ("solid", "dashed", "dotted", "dashdot")
# Statistics of hidden states: key -> title, label and options of the axis over steps.
_GEOMETRY = {
    "effective_rank": ("Effective rank", "effective rank (log scale)", {"log": True}),
    "cosine": ("Average cosine similarity", "cosine, all pairs", {}),
}
# Side by side in one image, those that were measured.
OVERVIEW = ("ntp_loss", "nitp_loss", "effective_rank", "cosine")


def drawings(variants: Sequence[Variant], spectrum_steps: Sequence[int] = ()) -> list[Drawing]:
    """All plots that the runs have data for."""
    several = any(len(variant.runs) > 1 for variant in variants)
    band = " Line: mean over seeds; band: smallest to largest." if several else ""
    return [
        *_losses(variants, band),
        *_geometry(variants, band),
        *_spectra(variants, spectrum_steps, several),
        *_layers(variants),
        *_training(variants, band),
    ]


def _losses(variants: Sequence[Variant], band: str) -> Iterator[Drawing]:
    ntp, validation, nitp = _logged("ntp_loss"), Run.validation_series, _logged("nitp_loss")
    if _any(variants, ntp):
        caption = "Cross-entropy of the training mini-batches, moving average." + band
        yield Drawing("ntp_loss", "NTP loss", caption, _zoomed(variants, ntp, "nats per token", smooth=True))
    if _any(variants, validation):
        caption = "Cross-entropy of the validation data." + band
        draw = _zoomed(variants, validation, "nats per token")
        yield Drawing("validation_ntp_loss", "Validation NTP loss", caption, draw)
    if _any(variants, nitp):
        caption = "Moving average; dots mark the end of the collapse, the hump and the last step (Figure 5)." + band
        yield Drawing("nitp_loss", "NITP loss", caption, _phases_marked(variants, nitp))


def _geometry(variants: Sequence[Variant], band: str) -> Iterator[Drawing]:
    for series, prefix, where, caption in (
        (_measured, "", "", "Last hidden states of the training mini-batches (Figure 1, App. D)."),
        (
            _validated,
            "validation_",
            ", fixed tokens",
            "Last hidden states of the same validation tokens in every variant.",
        ),
    ):
        for stat, (title, label, axis) in _GEOMETRY.items():
            yield from _plain(
                variants, series("hidden", stat), prefix + stat, title + where, caption + band, label, **axis
            )
    yield from _plain(
        variants,
        _measured("target", "effective_rank"),
        "target_effective_rank",
        "Effective rank of the implicit target",
        "It drifts where gradients reach the target." + band,
        "effective rank (log scale)",
        log=True,
    )


def _spectra(variants: Sequence[Variant], wanted: Sequence[int], several: bool) -> Iterator[Drawing]:
    if steps := chosen_steps(variants, wanted):
        lines = ", ".join(f"{style} at step {step:,}" for step, style in zip(steps, _SPECTRUM_STYLES))
        whose = ", first seed of each variant: " if several else ": "
        caption = f"Covariance of the last hidden states{whose}{lines}."
        yield Drawing("spectra", "Eigenvalue spectrum", caption, _spectra_at(variants, steps))


def _layers(variants: Sequence[Variant]) -> Iterator[Drawing]:
    runs = [run for variant in variants for run in variant.runs]
    for stat, (title, label, _) in _GEOMETRY.items():
        # Layers at different steps do not compare the variants.
        steps = common_steps(run.geometry_series("layer_0", stat) for run in runs)
        if steps:
            caption = f"Output of every layer at step {steps[-1]:,}."
            label = label.removesuffix(" (log scale)")
            yield Drawing(f"layers_{stat}", f"{title} by layer", caption, _by_layer(variants, stat, label, steps[-1]))


def _training(variants: Sequence[Variant], band: str) -> Iterator[Drawing]:
    caption = "The same line for every variant of a fair comparison."
    yield from _plain(variants, _logged("lr"), "learning_rate", "Learning rate", caption, "learning rate")
    speed = _logged("tokens_per_second")
    if _any(variants, speed):
        caption = "Tokens per second over all ranks, moving average. It depends on the machine's other load too." + band
        draw = _labelled(_curves(variants, speed, smooth=True), "tokens/s", ylim=(0, None))
        yield Drawing("throughput", "Throughput", caption, draw)
    caption = "Before clipping, of NTP and NITP together; single steps." + band
    yield from _plain(variants, _logged("grad_norm"), "gradient_norm", "Gradient norm", caption, "norm", log=True)


def _plain(
    variants: Sequence[Variant],
    series: Callable[[Run], Series],
    name: str,
    title: str,
    caption: str,
    label: str,
    **limits,
) -> Iterator[Drawing]:
    """A plot of unsmoothed curves, if a run has data for it."""
    if _any(variants, series):
        yield Drawing(name, title, caption, _labelled(_curves(variants, series), label, **limits))


def _logged(key: str) -> Callable[[Run], Series]:
    return lambda run: run.series(key)


def _measured(site: str, stat: str) -> Callable[[Run], Series]:
    return lambda run: run.geometry_series(site, stat)


def _validated(site: str, stat: str) -> Callable[[Run], Series]:
    return lambda run: run.validation_geometry_series(site, stat)


def _any(variants: Sequence[Variant], series: Callable[[Run], Series]) -> bool:
    return any(series(run)[0] for variant in variants for run in variant.runs)


def color(variants: Sequence[Variant], variant: Variant) -> str:
    """The variant's colour, the same in every plot."""
    return COLORS[variants.index(variant) % len(COLORS)]


def _curves(
    variants: Sequence[Variant], series: Callable[[Run], Series], *, smooth: bool = False
) -> Callable[[Axes], None]:
    """Curves of the mean of each variant's runs, with a band from their smallest to their largest value."""

    def draw(axes: Axes) -> None:
        for index, variant in enumerate(variants):
            steps, rows = _aligned([series(run) for run in variant.runs])
            if not steps:
                continue
            line = [fmean(column) for column in zip(*rows)]
            rows = [smoothed(row) for row in rows] if smooth else rows
            shade = color(variants, variant)
            if smooth and len(rows) == 1:
                axes.plot(steps, line, color=shade, alpha=0.25, linewidth=0.7)
            if len(rows) > 1:
                columns = list(zip(*rows))
                low, high = [min(column) for column in columns], [max(column) for column in columns]
                axes.fill_between(steps, low, high, color=shade, alpha=0.2, linewidth=0)
            # Variants may coincide: the first is drawn widest and below, so that it shows under the others.
            width = 1.5 + (1.5 if index == 0 and len(variants) > 1 else 0)
            points: dict[str, Any] = {} if len(steps) > 1 else {"marker": "o"}
            line = smoothed(line) if smooth else line
            axes.plot(steps, line, color=shade, label=variant.name, linewidth=width, **points)
        axes.set_xlabel("step")

    return draw


def _aligned(every: Sequence[Series]) -> tuple[list[int], list[list[float]]]:
    """Values of several runs at the steps that all of them have."""
    tables = [dict(zip(*pair)) for pair in every if pair[0]]
    if not tables:
        return [], []
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return steps, [[table[step] for step in steps] for table in tables]


def _zoomed(
    variants: Sequence[Variant], series: Callable[[Run], Series], label: str, *, smooth: bool = False
) -> Callable[[Axes], None]:
    """Curves without their steep start: the axis ends a little above the later values, and its label says so."""
    curves = _curves(variants, series, smooth=smooth)

    def zoomed(axes: Axes) -> None:
        curves(axes)
        finite = [[v for v in series(run)[1] if math.isfinite(v)] for variant in variants for run in variant.runs]
        later = [value for values in finite for value in values[len(values) // 8 :]]
        cut = ""
        if later:
            low, high = min(later), max(later)
            top = high + 0.08 * (high - low) + 1e-9
            axes.set_ylim(low - 0.04 * (high - low) - 1e-9, top)
            cut = f", above {top:.2g} cut off" if any(value > top for values in finite for value in values) else ""
        axes.set_ylabel(label + cut)

    return zoomed


def _labelled(draw: Callable[[Axes], None], label: str, *, log: bool = False, **limits) -> Callable[[Axes], None]:
    def labelled(axes: Axes) -> None:
        draw(axes)
        axes.set_ylabel(label)
        axes.set(**limits)
        if log:
            _log_scaled(axes)

    return labelled


def _log_scaled(axes: Axes) -> None:
    """Logarithmic y axis whose ticks are plain numbers, within a decade too."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else AutoLocator())
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _phases_marked(variants: Sequence[Variant], series: Callable[[Run], Series]) -> Callable[[Axes], None]:
    curves = _curves(variants, series, smooth=True)

    def draw(axes: Axes) -> None:
        curves(axes)
        every = []
        for variant in variants:
            steps, rows = _aligned([series(run) for run in variant.runs])
            if marks := phases(steps, [fmean(column) for column in zip(*rows)]):
                every.append(marks)
                for name in ("collapse", "hump", "end"):
                    axes.plot(*marks[name], marker="o", markersize=4, color=color(variants, variant))
        axes.set(ylabel="NITP loss", ylim=(0, None))
        # Room for the words above every curve, at the first variant's phases.
        if every:
            top = axes.get_ylim()[1]
            axes.set_ylim(0, 1.12 * top)
            for name in ("collapse", "hump"):
                step, value = every[0][name]
                axes.plot([step, step], [value, 1.06 * top], color="#8b929b", linewidth=0.8, linestyle=":", zorder=1)
                axes.annotate(name, (step, 1.07 * top), fontsize=8, ha="center", va="bottom")

    return draw


def _spectra_at(variants: Sequence[Variant], steps: Sequence[int]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for variant in variants:
            by_step = {record["step"]: record for record in variant.runs[0].geometry if _has_spectrum(record)}
            for step, style in zip(steps, _SPECTRUM_STYLES):
                if step not in by_step:
                    continue
                spectrum = by_step[step]["hidden"]["spectrum"]
                points = [(r, s) for r, s in zip(spectrum["rank"], spectrum["share"]) if s > 0]
                if points:
                    label = variant.name if style == _SPECTRUM_STYLES[0] else None
                    axes.plot(
                        *zip(*points), color=color(variants, variant), linestyle=style, label=label, linewidth=1.3
                    )
        axes.set(xscale="log", yscale="log", xlabel="eigenvalue, by rank", ylabel="share of the variance")

    return draw


def _has_spectrum(record: dict) -> bool:
    hidden = record.get("hidden")
    return isinstance(hidden, dict) and isinstance(hidden.get("spectrum"), dict)


def chosen_steps(variants: Sequence[Variant], wanted: Sequence[int] = ()) -> list[int]:
    """Steps whose spectra are drawn, latest first: the measured ones nearest to those wanted, or three over the run."""
    measured = [
        {record["step"] for record in variant.runs[0].geometry if _has_spectrum(record)} for variant in variants
    ]
    common = sorted(set.intersection(*[steps for steps in measured if steps] or [set()]))
    if not common:
        return []
    wanted = wanted or (common[0], common[-1] / 4, common[-1])
    nearest = {min(common, key=lambda step: abs(step - target)) for target in wanted}
    return sorted(nearest, reverse=True)[: len(_SPECTRUM_STYLES)]


def _by_layer(variants: Sequence[Variant], stat: str, label: str, step: int) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for variant in variants:
            rows = [profile for run in variant.runs if (profile := _profile(run, stat, step))]
            numbers = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
            if numbers:
                line = [fmean(row[number] for row in rows) for number in numbers]
                low, high = ([pick(row[n] for row in rows) for n in numbers] for pick in (min, max))
                axes.fill_between(numbers, low, high, color=color(variants, variant), alpha=0.2, linewidth=0)
                axes.plot(numbers, line, color=color(variants, variant), marker="o", markersize=3.5, label=variant.name)
        axes.set(xlabel="layer (0 is the embedding)", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # stub of the base class

    return draw


def _profile(run: Run, stat: str, step: int) -> dict[int, float]:
    """Layer -> a statistic at a step of a run; empty if layers were not measured."""
    states = next((record for record in run.geometry if record["step"] == step), {})
    layers = {int(s.removeprefix("layer_")): v for s, v in states.items() if s.startswith("layer_") and stat in v}
    return {number: values[stat] for number, values in layers.items()}
