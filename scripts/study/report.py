"""The table of the mechanism study: claims of the paper, and whether the runs of recipes/study show them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from nitp_titan import markdown
from nitp_titan.difference import bootstrap_interval
from nitp_titan.errors import UserError
from nitp_titan.report.runs import read_variants, Run, Variant
from nitp_titan.report.stats import (
    final_mean,
    last,
    paired,
    phases,
)

Getter = Callable[[Run], float | None]

_NOTE = (
    "Value: mean over seeds (smallest to largest). Interval: 95% bootstrap of the mean difference over pairs of the "
    "same seed; with three pairs it goes from the smallest to the largest difference. Seen: the interval leaves out "
    "zero, a preserved loss is within 0.01 nats, a fall is below 0.95. Three differences agree in their sign by chance "
    "alone in one comparison of four."
)


def _hump_over_collapse(run: Run) -> float | None:
    marks = phases(*run.series("nitp_loss"))
    return marks and marks["hump"][1] / marks["collapse"][1]


def _end_over_hump(run: Run) -> float | None:
    marks = phases(*run.series("nitp_loss"))
    return marks and marks["end"][1] / marks["hump"][1]


def _largest_gradient(run: Run) -> float | None:
    """Largest gradient norm over the median one, after the warm-up."""
    warmup = run.settings.get("lr_scheduler.warmup_steps", 0)
    norms = [norm for step, norm in zip(*run.series("grad_norm")) if step > warmup]
    return max(norms) / median(norms) if norms else None


def _validation(run: Run) -> float | None:
    return last(run.validation_series())


def _validated(stat: str, site: str = "hidden") -> Getter:
    return lambda run: last(run.validation_geometry_series(site, stat))


def _rank_over_peak(run: Run) -> float | None:
    """Last effective rank over the largest one after the collapse of the first 200 steps."""
    ranks = [rank for step, rank in zip(*run.validation_geometry_series("hidden", "effective_rank")) if step >= 200]
    return ranks[-1] / max(ranks) if ranks else None


@dataclass(frozen=True)
class Mechanism:
    """A claim of the paper that one number of a run supports or contradicts."""

    claim: str
    stat: str
    value_of: Getter
    format: str
    variant: str
    baseline: str | None
    """Variant that it is compared with; None if the number itself is compared with 1."""

    expected: int
    """1 for a claim that the number is larger than the baseline's (without one: than 1), -1 smaller, 0 the same."""

    negligible: float = 0.0
    """Size of a difference that still counts as the same."""


def _against_ntp(variant: str, baseline: str = "ntp", note: str = "") -> list[Mechanism]:
    return [
        Mechanism(
            f"NTP loss is preserved{note}",
            "validation NTP loss",
            _validation,
            ".3f",
            variant,
            baseline,
            0,
            negligible=0.01,
        ),
        Mechanism(
            f"effective rank is higher{note}",
            "effective rank, validation",
            _validated("effective_rank"),
            ".2f",
            variant,
            baseline,
            1,
        ),
        Mechanism(f"cosine is lower{note}", "cosine, validation", _validated("cosine"), ".3f", variant, baseline, -1),
    ]


def _falls(variant: str, note: str = "") -> Mechanism:
    claim = f"effective rank of NTP falls after its peak{note}"
    # A ratio to the largest value is at most 1: less than a twentieth below it is not a fall.
    return Mechanism(claim, "last over largest, validation", _rank_over_peak, ".2f", variant, None, -1, negligible=0.05)


MECHANISMS = [
    Mechanism("NITP loss collapses, then rises", "hump over collapse", _hump_over_collapse, ".1f", "nitp", None, 1),
    Mechanism("and then declines", "end over hump", _end_over_hump, ".2f", "nitp", None, -1),
    Mechanism(
        "the same position aligns far more closely",
        "NITP loss at the end",
        lambda run: final_mean(run.series("nitp_loss")),
        ".3f",
        "same_position",
        "nitp",
        -1,
    ),
    Mechanism("and is the worse objective", "validation NTP loss", _validation, ".3f", "same_position", "nitp", 1),
    Mechanism(
        "without stop-gradient the target drifts",
        "effective rank of the target",
        _validated("effective_rank", "target"),
        ".2f",
        "no_stop_gradient",
        "nitp",
        -1,
    ),
    Mechanism(
        "and lies in a narrow cone",
        "cosine of the target",
        _validated("cosine", "target"),
        ".2f",
        "no_stop_gradient",
        "nitp",
        1,
    ),
    Mechanism("without projector it is worse", "validation NTP loss", _validation, ".3f", "no_projector", "nitp", 1),
    Mechanism(
        "MSE makes gradients spike", "largest gradient over the median", _largest_gradient, ".1f", "loss_mse", "nitp", 1
    ),
    *_against_ntp("nitp"),
    *_against_ntp("weight_0.1", note=", weight 0.1"),
    _falls("ntp"),
    *_against_ntp("nitp_long", "ntp_long", ", 8.2M tokens"),
    _falls("ntp_long", ", 8.2M tokens"),
    *_against_ntp("nitp_vocab_16k", "ntp_vocab_16k", ", vocabulary 16,384"),
]


def read_study(folder: Path) -> dict[str, Variant]:
    """Variants of a study by the name of their recipe.

    Raises:
        UserError: if there is no finished run.
    """
    paths = sorted(path for path in folder.glob("*") if any(path.glob("*/metrics.jsonl")))
    if not paths:
        raise UserError(f"{folder} holds no runs of the study yet.")
    variants, _ = read_variants(f"{path.name}={path}" for path in paths)
    finished = {
        variant.name: [run for run in variant.runs if run.last_step == run.planned_steps] for variant in variants
    }
    return {name: Variant(name, runs) for name, runs in finished.items() if runs}


def mechanisms_table(variants: dict[str, Variant]) -> str:
    """Markdown table of the mechanisms whose variants have finished runs, with a note on how to read it."""
    header = ["claim", "statistic", "variant", "value", "baseline", "difference (95% interval)", "seeds", "seen"]
    rows = [row for mechanism in MECHANISMS if (row := _row(mechanism, variants))]
    if not rows:
        return "No claim has finished runs of both its variants yet."
    return markdown.table(header, rows, "lllrrrrl") + f"\n\n{_NOTE}"


def _row(mechanism: Mechanism, variants: dict[str, Variant]) -> list[str] | None:
    value_of, spec = mechanism.value_of, mechanism.format
    if mechanism.variant not in variants or (mechanism.baseline and mechanism.baseline not in variants):
        return None
    names, reference, difference = mechanism.variant, "-", "-"
    if mechanism.baseline is None:
        values = [value for run in variants[mechanism.variant].runs if (value := value_of(run)) is not None]
        changes = [value - 1 for value in values]
    else:
        runs = paired(variants[mechanism.variant], variants[mechanism.baseline])
        pairs = [(value_of(run), value_of(other)) for run, other in runs]
        pairs = [(value, other) for value, other in pairs if value is not None and other is not None]
        values, changes = [value for value, _ in pairs], [value - other for value, other in pairs]
    if not values:
        return None
    interval = bootstrap_interval(changes)
    if mechanism.baseline is not None:
        names += f" against {mechanism.baseline}"
        reference = f"{fmean(other for _, other in pairs):z{spec}}"
        spread = f" ({interval[0]:+z{spec}} to {interval[1]:+z{spec}})" if interval else ""
        difference = f"{fmean(changes):+z{spec}}{spread}"
    value = f"{fmean(values):z{spec}} ({min(values):z{spec}} to {max(values):z{spec}})"
    seen = _seen(mechanism, interval)
    return [mechanism.claim, mechanism.stat, names, value, reference, difference, str(len(values)), seen]


def _seen(mechanism: Mechanism, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "too few seeds"
    low, high = interval
    same = -mechanism.negligible <= low and high <= mechanism.negligible
    direction = 1 if low > mechanism.negligible else -1 if high < -mechanism.negligible else 0
    if mechanism.expected == 0:
        return "yes" if same else {1: "no, higher", -1: "no, lower", 0: "unclear"}[direction]
    if direction == 0:
        return "no" if same else "unclear"
    return "yes" if direction == mechanism.expected else "no, the opposite"
