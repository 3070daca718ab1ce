"""The report itself: one HTML page that needs nothing else, and the same as Markdown."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from nitp_titan import markdown
from nitp_titan.difference import Difference
from nitp_titan.report import drawing, plots, runs
from nitp_titan.report.runs import ChangedSettings, Variant
from nitp_titan.report.stats import (
    difference,
    FINAL_SHARE,
    phases,
    Stat,
    STATS,
    TOKENS,
)

_NOTE = (
    f"NTP and NITP loss, effective rank and cosine are means over the last {FINAL_SHARE:.0%} of the steps that all "
    "runs have logged, validation values are of the last such step; ± is half the range over seeds. Validation values "
    "are of the same validation tokens in every variant. Runs one after the other say nothing of what a variant "
    "costs: scripts/overhead measures that. Intervals are 95% bootstrap intervals of the mean difference over "
    "pairs of the same seed; with three pairs such an interval goes from the smallest to the largest difference and "
    "leaves out zero by chance alone in one comparison of four."
)

# Statistics in the summary: of each group the first that was measured.
_SUMMARY = (
    ("validation NTP loss", "NTP loss"),
    ("validation effective rank", "effective rank"),
    ("validation cosine", "cosine"),
)


class Report:
    """A comparison of variants with the first, read once and written as page and Markdown.

    Args:
        variants: baseline first.
        problems: files that could not be read, a line each.
        spectrum_steps: steps whose spectra are drawn; by default the first, a middle one and the last.
    """

    def __init__(
        self, variants: Sequence[Variant], problems: Sequence[str] = (), *, spectrum_steps: Sequence[int] = ()
    ):
        self.variants, self.problems = list(variants), list(problems)
        every_run = [run for variant in variants for run in variant.runs]
        self.steps = {stat: stat.steps(every_run) for stat in (TOKENS, *STATS)}
        self.settings: ChangedSettings = runs.changed_settings(variants)
        self.settings.warnings.extend(
            f"{stat.name}: the runs have no step in common; it is not compared."
            for stat in STATS
            if not self.steps[stat] and any(stat.series(run)[0] for run in every_run)
        )
        self.drawings = plots.drawings(variants, spectrum_steps)

    @property
    def baseline(self) -> Variant:
        return self.variants[0]

    def title(self) -> str:
        others = ", ".join(variant.name for variant in self.variants[1:])
        return f"{others} against {self.baseline.name}" if others else self.baseline.name

    def values(self, variant: Variant, stat: Stat) -> list[float]:
        """The final value of every run of a variant that has one."""
        return [value for run in variant.runs if (value := stat.value(run, self.steps[stat])) is not None]

    def final_table(self) -> tuple[list[str], list[list[str]]]:
        """Header, rows of means over seeds, one per variant, and a last row with the steps of every statistic."""
        stats = [stat for stat in STATS if any(self.values(variant, stat) for variant in self.variants)]
        header = ["variant", "runs", TOKENS.name, *(stat.name for stat in stats)]
        rows = []
        for variant in self.variants:
            tokens = self.values(variant, TOKENS)
            row = [variant.name, str(len(variant.runs)), f"{fmean(tokens):{TOKENS.format}}" if tokens else "-"]
            rows.append([*row, *(self._cell(variant, stat) for stat in stats)])
        return header, [*rows, ["at step", "", *(self.at(stat) for stat in (TOKENS, *stats))]]

    def at(self, stat: Stat) -> str:
        """The steps that a statistic is of."""
        steps = self.steps[stat]
        return "-" if not steps else f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"

    def _cell(self, variant: Variant, stat: Stat) -> str:
        values = self.values(variant, stat)
        if not values:
            return "-"
        spread = (max(values) - min(values)) / 2
        plus_minus = f" ± {spread:z{stat.format}}" if len(values) > 1 else ""
        return f"{fmean(values):z{stat.format}}{plus_minus}"

    def difference_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the differences to the baseline, one per statistic and variant."""
        header = ["statistic", "at step", "variant", "difference", "95% interval", "pairs", "the data"]
        rows = []
        for stat in STATS:
            for variant in self.variants[1:]:
                change = self._difference(variant, stat) if stat.compared else None
                if change is not None:
                    rows.append([stat.name, self.at(stat), variant.name, *_difference_cells(change, stat.format)])
        return header, rows

    def _difference(self, variant: Variant, stat: Stat) -> Difference | None:
        return difference(variant, self.baseline, stat, self.steps[stat])

    def sentences(self) -> list[str]:
        """A plain sentence per variant on the differences that the data show, then the phases of the NITP loss."""
        sentences = [sentence for variant in self.variants[1:] if (sentence := self._compared(variant))]
        sentences += [sentence for variant in self.variants if (sentence := self._phases(variant))]
        return sentences if len(self.variants) > 1 else ["One variant alone is not a comparison.", *sentences]

    def _compared(self, variant: Variant) -> str:
        by_name = {stat.name: stat for stat in STATS}
        differences: dict[Stat, Difference] = {}
        for names in _SUMMARY:
            for stat in (by_name[name] for name in names):
                if (change := self._difference(variant, stat)) is not None:
                    differences[stat] = change
                    break
        if not differences:
            return f"{variant.name} and {self.baseline.name} have no seed or no step in common: nothing is compared."
        pairs = max(change.pairs for change in differences.values())
        head = f"{variant.name} against {self.baseline.name}"
        texts = {stat: self._difference_text(stat, change) for stat, change in differences.items()}
        if all(change.interval is None for change in differences.values()):
            runs = "one run per variant" if pairs == 1 else f"{pairs} pairs of runs"
            every = "; ".join(texts.values())
            return f"{head}: {every}. With {runs} all of this may be chance: the data show nothing."
        seen, rest = (
            [texts[stat] for stat, change in differences.items() if change.excludes_zero is s] for s in (True, False)
        )
        parts = [f"the data show a difference in {'; '.join(seen)}"] if seen else []
        parts += [
            f"they show none in {'; '.join(rest)}" if seen else f"the data show no difference in {'; '.join(rest)}"
        ]
        return f"{head}, {pairs} seeds: {', and '.join(parts if rest else parts[:1])}."

    def _difference_text(self, stat: Stat, change: Difference) -> str:
        interval = _interval_text(change, stat.format)
        return f"{stat.name} {change.value:+z{stat.format}}{interval and f' ({interval})'} at step {self.at(stat)}"

    @staticmethod
    def _phases(variant: Variant) -> str:
        every = [marks for run in variant.runs if (marks := phases(*run.series("nitp_loss")))]
        if not every:
            return ""
        start, collapse, hump, end = (fmean(marks[name][1] for marks in every) for name in every[0])
        steps = {name: sorted(marks[name][0] for marks in every) for name in ("collapse", "hump")}
        at = {name: f"step {s[0]:,}" if s[0] == s[-1] else f"steps {s[0]:,} to {s[-1]:,}" for name, s in steps.items()}
        return (
            f"NITP loss of {variant.name} (moving average): {start:.3f} at the first step, collapses to {collapse:.3f} "
            f"({at['collapse']}), rises to {hump:.3f} ({at['hump']}), ends at {end:.3f}."
        )

    def write(self, folder: Path) -> None:
        """Write ``index.html``, ``report.md``, every plot as PNG and SVG and the first ones as ``overview.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        for each in self.drawings:
            drawing.write_files(each, folder)
        overview = [each for name in plots.OVERVIEW for each in self.drawings if each.name == name]
        if overview:
            drawing.write_overview(overview, folder / "overview.png")
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "index.html").write_text(self.html(), encoding="utf-8")

    def markdown(self) -> str:
        """The report as Markdown, with the PNG files as pictures."""
        parts = [f"# {self.title()}", f"At step {self.at(TOKENS)}.", _bullets(self.sentences())]
        parts += ["**Not a fair comparison:**\n\n" + _bullets(self.settings.warnings)] if self.settings.warnings else []
        parts += ["**Could not be read:**\n\n" + _bullets(self.problems)] if self.problems else []
        parts += ["## Final values", markdown.table(*self.final_table())]
        parts += [_NOTE, "## Plots"]
        parts += [f"![{d.title}]({d.name}.png)\n\n{d.caption}" for d in self.drawings]
        if self.difference_table()[1]:
            parts += [f"## Differences to {self.baseline.name}", markdown.table(*self.difference_table())]
        parts += ["## Settings that differ", *self._settings_parts(markdown.table, _bullets)]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """The report as one page: no script, no request, the colours of the reader's scheme."""
        charts = "\n".join(
            f"<figure>{drawing.svg(d)}<figcaption><b>{escape(d.title)}.</b> {escape(d.caption)}</figcaption></figure>"
            for d in self.drawings
        )
        boxes = ""
        for name, lines in (("Not a fair comparison", self.settings.warnings), ("Could not be read", self.problems)):
            boxes += f'<section class="warning"><h2>{name}</h2>{_html_list(lines)}</section>' if lines else ""
        differences = ""
        if self.difference_table()[1]:
            differences = f"<h2>Differences to {escape(self.baseline.name)}</h2>{_html_table(*self.difference_table())}"
        settings = "".join(self._settings_parts(_html_table, _html_list))
        key = "".join(
            f'<span><i style="background:{plots.color(self.variants, variant)}"></i>{escape(variant.name)}</span>'
            for variant in self.variants
        )
        return _PAGE.format(
            title=escape(self.title()),
            style=_STYLE,
            step=self.at(TOKENS),
            key=key,
            sentences=_html_list(self.sentences()),
            boxes=boxes,
            final=_html_table(*self.final_table()),
            differences=differences,
            note=escape(_NOTE),
            charts=charts,
            settings=settings,
        )

    def _settings_parts(self, table: Callable, bullets: Callable) -> list[str]:
        known = [variant.name for variant in self.variants if variant.settings]
        groups = {**self.settings.nitp, **self.settings.others}
        if not groups:
            return [bullets(["Nothing but the seeds." if known else "The settings of the runs are unknown."])]
        beyond = "Beyond [nitp] they differ in: " + (", ".join(self.settings.others) or "nothing") + "."
        rows = [[key, *map(_shortened, values)] for key, values in groups.items()]
        return [bullets([beyond]), table(["setting", *known], rows)]


def _shortened(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _difference_cells(change: Difference, spec: str) -> list[str]:
    """Difference, interval, pairs and verdict, as texts in the format ``spec``."""
    if change.interval is None:
        verdict = "may be chance"
    else:
        verdict = "show a difference" if change.excludes_zero else "show no difference"
    return [f"{change.value:+z{spec}}", _interval_text(change, spec) or "-", str(change.pairs), verdict]


def _interval_text(change: Difference, spec: str) -> str:
    return " to ".join(f"{end:+z{spec}}" for end in change.interval or ())


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def markdown_table(report: Report) -> str:
    """The table of final values."""
    return markdown.table(*report.final_table())


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59616b; --page: #ffffff; --grid: #e3e6ea; --box: #f6f7f9;
  --warn: #8a4b00; --warn-box: #fff6e8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a3abb5; --page: #14171b; --grid: #2c3138;
  --box: #1c2026; --warn: #ffc46b; --warn-box: #2b2317; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 90rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.step, .note, figcaption { color: var(--soft); font-size: .9rem; }
.note { max-width: 75ch; }
li { max-width: 85ch; margin: .3rem 0; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; margin: .6rem 0; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .8rem 0; }
.key i { display: inline-block; width: 1.1rem; height: .3rem; border-radius: 2px; margin-right: .4rem;
  vertical-align: middle; }
.warning { background: var(--warn-box); border-left: 4px solid var(--warn); padding: .2rem 1rem .6rem; margin: 1rem 0; }
.warning h2 { margin: .8rem 0 .2rem; color: var(--warn); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .45rem; text-align: right; border-bottom: 1px solid var(--grid); }
td { white-space: nowrap; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
th { font-weight: 600; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.4rem; }
figure { margin: 0; padding: .8rem; background: var(--box); border-radius: 8px; }
.chart { display: block; width: 100%; height: auto; }
.chart text { font-family: system-ui, sans-serif !important; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><div class="step">At step {step}</div><div class="key">{key}</div></header>
<main>
{sentences}
{boxes}
<h2>Final values</h2>
{final}
<p class="note">{note}</p>
<h2>Plots</h2>
<div class="charts">
{charts}
</div>
{differences}
<h2>Settings that differ</h2>
{settings}
</main>
</body>
</html>
"""
