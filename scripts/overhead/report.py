"""The page of scripts/overhead: tables, plots and the numbers themselves."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from nitp_titan.errors import UserError
from nitp_titan.markdown import table
from nitp_titan.report.drawing import Drawing
from nitp_titan.report.folder import write_page
from nitp_titan.report.plots import COLORS

Stats = dict[str, Any]

_FILE = "overhead.json"
# Bars of the project: what NITP may cost at most.
TIME_BAR = 1.3
"""Step-time overhead as a multiple of the FLOP overhead (App. G)."""

MEMORY_BAR = 0.02
"""Activation memory above NTP."""

FLOPS_BAR = 0.001
"""Difference of the counted FLOP overhead to App. G's."""

MTP_BAR = 8.0
"""How many times MTP's overhead in time is NITP's."""

# An interval as wide as the distance leaves the border out half of the time; one so much narrower four times of five.
_POWER = (1.96 + 0.84) / 1.96
# No measurement is planned with more.
_MANY_ROUNDS = 1_000_000

_ARM_COLORS = dict(zip(("NTP", "NITP", "MTP"), COLORS))


def merged(out: Path, part: str, found: Stats) -> Stats:
    """What the folder holds already, with a new result of one part."""
    return {**read(out), part: found}


def read(out: Path) -> Stats:
    """Results of the parts that were run so far; UserError if the file is damaged."""
    path = out / _FILE
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Remove it, or choose another folder with --out.") from None


def as_json(result: Stats) -> str:
    """The text of ``overhead.json``."""
    return json.dumps(result, indent=1, allow_nan=False)


def tables(result: Stats) -> str:
    """All tables, in Markdown."""
    return "\n\n".join(section(result[part]) for part, section in _SECTIONS.items() if part in result)


def markdown(result: Stats) -> str:
    """The page ``overhead.md``."""
    plots = [f"![{one.title}]({one.name}.png)\n\n{one.caption}" for one in drawings(result)]
    return "\n\n".join(["# What NITP costs", tables(result), *plots]) + "\n"


def write(result: Stats, out: Path) -> list[Path]:
    """Write ``overhead.json``, ``overhead.md``, every plot as PNG and SVG, and all in one ``overhead.png``.

    Returns:
        The files. They appear once all of them are complete.

    Raises:
        UserError: if they cannot be written.
    """
    return write_page(out, "overhead", text=markdown(result), data=as_json(result), drawings=drawings(result))


def _percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{100 * value:+z.{digits}f}%"


def _measured(part: Stats) -> str:
    machine = part["machine"]
    where = (
        f"{machine['device']} ({machine['processor']}, {machine['cores']} cores), torch {machine['torch']}, "
        f"{machine['date']}: {part['recipe']}, {part['batch_size']} x {part['seq_len']} tokens"
    )
    blocks = []
    for name, setting in part["settings"].items():
        blocks.append(f"**{where}, {name}, {setting['rounds']} rounds.**")
        blocks.append(_measured_table(setting["variants"]))
        blocks += _bars(setting)
    if "unchunked" in part:
        ntp, nitp = part["unchunked"]["NTP"], part["unchunked"]["NITP"]
        blocks.append(
            f"With the loss in one chunk: {ntp / 1e6:.0f} MB and {nitp / 1e6:.0f} MB ({_percent(nitp / ntp - 1)})."
        )
    if machine["device"] == "CPU":
        blocks.append("Nothing of this was run on a GPU.")
    return "\n\n".join(blocks)


def flop_overhead(variants: Stats, name: str) -> float | None:
    """Matrix products that a variant adds to the baseline, as a fraction (App. G); None where they were not counted."""
    ntp = variants["NTP"]["matmul_flops"]
    return ntp and variants[name]["matmul_flops"] / ntp - 1


def time_overhead(variants: Stats, name: str) -> float:
    """Median of a variant's steps over those of the baseline in the same round, minus one."""
    return variants[name]["ratio"]["median"] - 1


def _measured_table(variants: Stats) -> str:
    header = ["variant", "FLOPs per token", "added", "added, attention counted", "step time", "added", "quartiles",
              "95% interval", "tokens/s", "MFU", "peak activations", "added"]  # fmt: skip
    rows = []
    ntp = variants["NTP"]
    whole = ntp["matmul_flops"] and ntp["matmul_flops"] + ntp["attention_flops"]
    for name, variant in variants.items():
        ratio, others = variant["ratio"], name != "NTP"
        flops = variant["matmul_flops"]
        rows.append(
            [
                name,
                f"{flops / 1e6:.1f}M" if flops else "-",
                _percent(flop_overhead(variants, name)) if others else "",
                _percent((flops + variant["attention_flops"]) / whole - 1 if flops else None) if others else "",
                f"{variant['seconds']['median']:.3f} s",
                _percent(time_overhead(variants, name)) if others else "",
                _range(ratio["quartiles"]) if others else "",
                _range(ratio["interval"]) if others else "",
                f"{variant['tokens_per_second']:,.0f}",
                f"{100 * variant['mfu']:.1f}%" if variant["mfu"] is not None else "-",
                f"{variant['peak_bytes'] / 1e6:.1f} MB",
                _percent(variant["peak_bytes"] / ntp["peak_bytes"] - 1) if others else "",
            ]
        )
    return table(header, rows)


def _range(ratios: tuple[float, float] | None) -> str:
    return "-" if ratios is None else " to ".join(_percent(ratio - 1) for ratio in ratios)


def _bars(setting: Stats) -> list[str]:
    """Sentences on the bars that a measurement decides, or on how many rounds would decide them."""
    variants, rounds = setting["variants"], setting["rounds"]
    flops, seconds, interval = (
        flop_overhead(variants, "NITP"),
        time_overhead(variants, "NITP"),
        _interval(variants, "NITP"),
    )
    bar = TIME_BAR * flops if flops else None
    borders = [0.0] if bar is None else [0.0, bar]
    measured = f"NITP's time is {_percent(seconds)} ({_range(variants['NITP']['ratio']['interval'])})"
    if hidden := [border for border in borders if interval[0] <= border <= interval[1]]:
        inside = " and ".join(f"the bar, {_percent(bar)}" if border else "0" for border in hidden)
        needed = rounds_to_show(
            rounds, interval, distance=min(abs(seconds - border) for border in hidden), gap=bar and bar - flops
        )
        hides = f"The noise hides what it is: the interval includes {inside}."
        return [f"{measured}. {hides} {_about(needed)} would show it."]
    lines = [f"{measured}."]
    if bar is not None:
        met = "within" if interval[1] < bar else "above"
        times = f", {seconds / flops:.2f} times its FLOPs" if seconds > 0 else ""
        lines = [f"{measured}{times}, {met} the bar of {TIME_BAR} times."]
    if seconds > 0:
        lines.append(_mtp_bar(variants, rounds))
    return [" ".join(lines)]


def _mtp_bar(variants: Stats, rounds: int) -> str:
    """How many times NITP's time MTP adds; NITP's is known to be above 0."""
    (low, high), (mtp_low, mtp_high) = (_interval(variants, name) for name in ("NITP", "MTP"))
    times = time_overhead(variants, "MTP") / time_overhead(variants, "NITP")
    # The ends of both intervals, which is wider than 95%.
    least, most = mtp_low / low if mtp_low < 0 else mtp_low / high, mtp_high / low
    said = f"MTP adds {times:.1f} times as much time as NITP ({least:.1f} to {most:.1f}; bar: {MTP_BAR:.0f})"
    if not least <= MTP_BAR <= most:
        return f"{said}."
    needed = rounds_to_show(rounds, (least, most), distance=abs(times - MTP_BAR))
    return f"{said}. The noise hides on which side of the bar it is. {_about(needed)} would show it."


def _interval(variants: Stats, name: str) -> tuple[float, float]:
    """95% interval of a variant's overhead in time."""
    low, high = variants[name]["ratio"]["interval"]
    return low - 1, high - 1


def rounds_to_show(
    rounds: int, interval: tuple[float, float], *, distance: float, gap: float | None = None
) -> int | None:
    """Rounds after which an interval, whose width falls with their square root, decides with a power of 80%.

    Args:
        rounds: of the measurement.
        interval: what it found.
        distance: of the measured value to the nearest border that the interval includes.
        gap: half of a width that decides whatever the value turns out to be; None if only `distance` is known. A value
            hidden in noise is a poor plan, so it counts only where the interval is narrower than that already.

    Returns:
        None if it is more than a million: then no number of rounds is a way out.
    """
    half = (interval[1] - interval[0]) / 2
    wanted = gap if gap is not None and gap < half else distance
    needed = rounds * (_POWER * half / wanted) ** 2 if wanted > 0 else math.inf
    return max(rounds + 1, math.ceil(needed)) if needed <= _MANY_ROUNDS else None


def _about(rounds: int | None) -> str:
    return f"More than {_MANY_ROUNDS:,} rounds" if rounds is None else f"About {rounds:,} rounds"


def _full_size(part: Stats) -> str:
    blocks = ["**The paper's models, one sequence of 8,192 tokens on one of 8 ranks (FSDP), counted on fake tensors.**"]
    header = ["model", "FLOPs per token", "NITP adds", "App. G", "points apart", "adds, attention counted", "MTP adds"]
    rows = [
        [
            row["model"],
            f"{row['ntp_matmul'] / 1e9:.2f}G",
            _percent(row["overhead"]),
            _percent(row["paper_overhead"]),
            f"{100 * row['difference']:+z.3f}",
            _percent(row["overhead_with_attention"]),
            _percent(row["mtp_overhead"], 1),
        ]
        for row in part["flops"]
    ]
    worst = max(abs(row["difference"]) for row in part["flops"])
    blocks += [table(header, rows), f"At most {100 * worst:.3f} points from App. G (bar: {100 * FLOPS_BAR:.1f})."]
    blocks += [_memory_table(part["memory"]), _communication_table(part["communication"])]
    return "\n\n".join(blocks)


def _setting(row: Stats) -> tuple[str, str]:
    """Column of a row of memory: of which variant, and how activations are kept."""
    chunks = ", loss in one chunk" if row["num_chunks"] == 1 else ""
    return row["variant"], f"{row['checkpointing']} AC{chunks}"


def _memory_table(memory: list[Stats]) -> str:
    by_place = {(row["model"], *_setting(row)): row for row in memory}
    columns = list(dict.fromkeys(_setting(row) for row in memory))
    names = [name if variant == "NITP" else f"{variant}, {name}" for variant, name in columns]
    rows = [
        [model, *(_memory_cell(by_place[model, *column]) for column in columns)]
        for model in dict.fromkeys(row["model"] for row in memory)
    ]
    chunked = [row for row in memory if row["variant"] == "NITP" and row["num_chunks"] is None]
    worst = max(row["share"] for row in chunked)
    caption = (
        f"Peak of the activations of NTP, and what NITP adds: at most {_percent(worst)} (bar: {100 * MEMORY_BAR:.0f}%)."
    )
    return f"{table(['model', *names], rows)}\n\n{caption}"


def _memory_cell(row: Stats) -> str:
    return f"{row['ntp_peak_bytes'] / 2**30:.2f} GiB {_percent(row['share'])}"


def _communication_table(rows: list[Stats]) -> str:
    header = ["layout", "model", "collective", "axis", "what", "calls", "MB", "NTP's calls", "NTP's MB"]
    cells = [
        [
            row["layout"],
            row["model"],
            row["kind"],
            row["group"],
            row["owner"],
            f"{row['calls']:+}",
            f"{row['payload'] / 1e6:+z,.2f}",
            str(row["ntp_calls"]),
            f"{row['ntp_payload'] / 1e6:,.0f}",
        ]
        for row in rows
    ]
    return table(header, cells, "lllllrrrr")


# Axis of a study -> its name and whether it is drawn on powers of two.
_GROWTH = {"seq_len": "tokens of a sequence", "dim": "model dimension", "num_ranks": "ranks (FSDP)"}
_SHARES = {"flops": "FLOPs", "peak_bytes": "activations", "payload": "communication"}


def _growth(part: Stats) -> str:
    blocks = ["**How NITP's share grows, counted on fake tensors, selective activation checkpointing.**"]
    for axis, name in _GROWTH.items():
        rows = [[row["series"], f"{row['x']:,}", *(_percent(row[share]) for share in _SHARES)] for row in part[axis]]
        blocks.append(table(["model", name, *_SHARES.values()], rows))
    return "\n\n".join(blocks)


def drawings(result: Stats) -> list[Drawing]:
    """Plots of the parts that were run."""
    found = []
    if "measured" in result:
        for number, (name, setting) in enumerate(result["measured"]["settings"].items()):
            title = "Cost above NTP" + (f", {name}" if len(result["measured"]["settings"]) > 1 else "")
            caption = "FLOPs counted, time as the median ratio of neighbouring steps with its 95% interval."
            suffix = f"_{number}" if number else ""
            found.append(Drawing(f"measured{suffix}", title, caption, _draw_measured(setting["variants"])))
    if "growth" in result:
        for axis, name in _GROWTH.items():
            caption = "What NITP adds to NTP, counted on fake tensors."
            found.append(
                Drawing(f"growth_{axis}", f"NITP's share by {name}", caption, _draw_growth(result["growth"], axis))
            )
    return found


_STYLES = ("solid", "dashed")


def _draw_growth(part: Stats, axis: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        series = list(dict.fromkeys(row["series"] for row in part[axis]))
        for style, name in zip(_STYLES, series):
            rows = [row for row in part[axis] if row["series"] == name]
            for color, (share, label) in zip(COLORS[1:], _SHARES.items()):
                label = f"{label}, {name}" if len(series) > 1 else label
                values = [100 * row[share] for row in rows]
                axes.plot(
                    [row["x"] for row in rows], values, color=color, linestyle=style, marker="o", ms=3, label=label
                )
        axes.set_xscale("log", base=2)
        dashed = f" (dashed: {series[1]})" if len(series) > 1 else ""
        axes.set(xlabel=_GROWTH[axis] + dashed, ylabel="% above NTP")
        axes.set_ylim(bottom=0)

    return draw


def _draw_measured(variants: Stats) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for place, name in enumerate(variant for variant in variants if variant != "NTP"):
            flops, seconds = flop_overhead(variants, name), 100 * time_overhead(variants, name)
            if flops is not None:
                axes.bar(place - 0.2, 100 * flops, 0.36, color=_ARM_COLORS[name], alpha=0.45)
                axes.annotate(f"FLOPs\n{100 * flops:.1f}%", (place - 0.2, 100 * flops), ha="center", va="bottom")
            low, high = (100 * (ratio - 1) for ratio in variants[name]["ratio"]["interval"])
            error = [[seconds - low], [high - seconds]]
            axes.bar(place + 0.2, seconds, 0.36, color=_ARM_COLORS[name], yerr=error, capsize=3)
            axes.annotate(f"time\n{seconds:.1f}%", (place + 0.2, high), ha="center", va="bottom")
        axes.set_xticks(range(len(variants) - 1), [name for name in variants if name != "NTP"])
        axes.set(ylabel="% above NTP")
        axes.margins(y=0.25)

    return draw


_SECTIONS: dict[str, Callable[[Stats], str]] = {"measured": _measured, "full_size": _full_size, "growth": _growth}
