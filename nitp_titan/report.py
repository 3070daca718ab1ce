"""Compare training runs: a table of final losses and a picture of the curves, from their metrics files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nitp_titan.config import UserError
from nitp_titan.metrics_file import read_records

# Share of the run that the "final" figures average over: single batches are noisy.
_FINAL_SHARE = 0.1
_SMOOTHING_SHARE = 0.04


@dataclass(frozen=True)
class Run:
    """One arm of a comparison."""

    name: str
    records: list[dict[str, float]]
    validation: list[dict[str, float]]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a figure, where it was logged."""
        found = [(record["step"], record[key]) for record in self.records if key in record]
        return [step for step, _ in found], [value for _, value in found]

    def final(self, key: str) -> float | None:
        """Mean of a figure over the last tenth of the logged steps."""
        _, values = self.series(key)
        count = max(1, round(len(values) * _FINAL_SHARE))
        return sum(values[-count:]) / count if values else None


def read_run(name: str, folder: Path) -> Run:
    """Read a run folder; UserError if it has no metrics."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} has no metrics.jsonl; it is not the folder of a training run.")
    records = read_records(path)
    if not records:
        raise UserError(f"{path} holds no steps.")
    validation = folder / "validation.jsonl"
    return Run(name, records, read_records(validation) if validation.is_file() else [])


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over up to ``width`` neighbours, shorter at both ends."""
    half = width // 2
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def smoothed(values: Sequence[float]) -> list[float]:
    """Moving average over a fixed share of the run."""
    return moving_average(values, 2 * max(1, round(len(values) * _SMOOTHING_SHARE / 2)) + 1)


def phases(steps: Sequence[int], values: Sequence[float]) -> dict[str, tuple[int, float]]:
    """The three phases of the NITP loss (Fig. 5): where it starts, its low, its hump and its end.

    Returns:
        ``{"start", "collapse", "hump", "end"}`` -> (step, smoothed value; the start is not
        smoothed): the collapse is the minimum of the first half, the hump the maximum after it.
    """
    smooth = smoothed(values)
    middle = len(smooth) // 2
    low = min(range(middle + 1), key=smooth.__getitem__)
    hump = max(range(low, len(smooth)), key=smooth.__getitem__)
    marks = {"start": 0, "collapse": low, "hump": hump, "end": len(smooth) - 1}
    return {name: (steps[index], smooth[index] if name != "start" else values[0]) for name, index in marks.items()}


def table(runs: Sequence[Run]) -> str:
    """Markdown table of the final figures, one row per run."""
    columns = {
        "steps": lambda run: f"{run.records[-1]['step']:,}",
        "tokens": lambda run: f"{int(run.records[-1]['tokens']):,}",
        "NTP loss": lambda run: _shown(run.final("ntp_loss")),
        "NITP loss": lambda run: _shown(run.final("nitp_loss")),
        "validation NTP loss": lambda run: _shown(run.validation[-1]["ntp_loss"] if run.validation else None),
        "tokens/s": lambda run: _shown(_median(run.series("tokens_per_second")[1]), ",.0f"),
        "memory GiB": lambda run: _shown(run.records[-1]["memory_gib"], ".2f"),
    }
    lines = [
        "| run | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *("| " + " | ".join([run.name, *(column(run) for column in columns.values())]) + " |" for run in runs),
    ]
    return "\n".join(lines)


def _shown(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw NTP loss of all runs and NITP loss where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (ntp_axes, nitp_axes) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colors = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    # Arms may coincide: the first is drawn widest and below, so that it shows under the others.
    for index, (run, color) in enumerate(zip(runs, colors)):
        linewidth = 1.8 + 1.6 * (len(runs) - 1 - index)
        for axes, key in ((ntp_axes, "ntp_loss"), (nitp_axes, "nitp_loss")):
            steps, values = run.series(key)
            if values:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                axes.plot(steps, smoothed(values), color=color, linewidth=linewidth, label=run.name)
    ntp_axes.set(title="NTP loss (cross-entropy)", xlabel="step", ylabel="nats per token")
    nitp_axes.set(title="NITP loss, 1 - cos(P(h), z)", xlabel="step", ylabel="loss", ylim=(0, None))
    for axes in (ntp_axes, nitp_axes):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_report(runs: Sequence[Run], folder: Path) -> str:
    """Write ``report.md`` and ``losses.png``; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    plot(runs, folder / "losses.png")
    text = table(runs)
    lines = ["# Comparison", "", text, "", "![Losses](losses.png)", ""]
    for run in runs:
        steps, values = run.series("nitp_loss")
        if len(values) >= 3:
            marks = phases(steps, values)
            lines.append(
                f"NITP loss of {run.name} (moving average): {marks['start'][1]:.3f} at the first step, collapses to "
                f"{marks['collapse'][1]:.3f} (step {marks['collapse'][0]}), rises to a hump of {marks['hump'][1]:.3f} "
                f"(step {marks['hump'][0]}) and ends at {marks['end'][1]:.3f}."
            )
    lines += [
        "",
        f"Losses are means over the last {_FINAL_SHARE:.0%} of the logged steps; tokens/s is the median. "
        "Thin lines are single steps, thick ones a moving average.",
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines))
    return text
