"""What NITP costs at full size, as rows of plain numbers: FLOPs, memory, communication, and how they grow.

Shares are fractions of NTP's value: 0.01 is one percent more. Bytes are those of one rank.
"""

from collections.abc import Callable, Collection
from typing import Any

from nitp_titan.sizing.trace import added, as_rows, Cost
from overhead.full_size import Case, count_all, Result

Log = Callable[[str], None]
Rows = list[dict[str, Any]]

MODELS = {
    "dense 0.5B": "dense/nitp_0.5b",
    "dense 2B": "dense/nitp_2b",
    "dense 3B": "dense/nitp_3b",
    "MoE 1.9B-A0.3B": "moe/nitp_1.9b_a0.3b",
    "MoE 3B-A0.5B": "moe/nitp_3b_a0.5b",
    "MoE 9B-A1B": "moe/nitp_9b_a1b",
    "MoE 45B-A5.5B (arXiv v1 only)": "moe/nitp_45b_a5.5b",
}
# Activation checkpointing and `[loss] num_chunks`, None for the default.
SETTINGS = (("none", None), ("selective", None), ("full", None), ("none", 1), ("full", 1))
# What MTP and its baseline are counted on: TorchTitan's MTP layer has no sharding for the default backend.
_MTP = {"parallelism": {"spmd_backend": "partial_dtensor"}}

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "FSDP 8": ("dense 0.5B", {}),
    "FSDP 64": ("dense 0.5B", {"num_ranks": 64}),
    "FSDP 8, MoE": ("MoE 9B-A1B", {}),
    "HSDP 2 x 8": ("dense 0.5B", {"num_ranks": 16, "parallelism": {"data_parallel_replicate_degree": 2}}),
    "FSDP 2 x TP 4": ("dense 3B", {"parallelism": {"tensor_parallel_degree": 4}}),
    "FSDP 2 x TP 4 without SP": (
        "dense 3B",
        {"parallelism": {"tensor_parallel_degree": 4, "enable_sequence_parallel": False}},
    ),
    "FSDP 2 x CP 8": ("dense 0.5B", {"num_ranks": 16, "parallelism": {"context_parallel_degree": 8}}),
}
# Kind and mesh axis of what NITP adds; FSDP's axis has several names.
_OWNERS = {
    ("all_gather", "tp"): "implicit tokens, gathered from sequence parallelism",
    ("all_reduce", "tp"): "the projector's output, summed over its shards",
    ("all_gather", "cp"): "halo: the first state and position id of every run of tokens",
    ("all_reduce", "dp_replicate"): "the projector's gradient, summed over replicas",
    ("all_gather", None): "the projector's parameters",
    ("reduce_scatter", None): "the projector's gradient",
}

SEQ_LENS = tuple(2**power for power in range(11, 18))
NUM_RANKS = (8, 64, 512, 1024)
DIMS = (1280, 2560, 5120)


def full_size(log: Log = print, models: Collection[str] = MODELS) -> dict[str, Rows]:
    """FLOPs and memory of the paper's models under FSDP on 8 ranks, one sequence of 8,192 tokens each.

    Returns:
        ``flops``, a row per model (per token, without activation checkpointing; ``difference`` is that of NITP's
        overhead to App. G's, as a fraction), and ``memory``, a row per model and setting.
    """
    settings = [(model, *setting) for model in models for setting in SETTINGS]
    cases = {
        (variant, *setting): Case(MODELS[setting[0]], variant, checkpointing=setting[1], num_chunks=setting[2])
        for setting in settings
        for variant in ("NTP", "NITP")
    }
    cases |= {
        ("MTP", model, variant): Case(MODELS[model], variant, **_MTP) for model in models for variant in ("NTP", "MTP")
    }
    results = dict(zip(cases, count_all(cases.values(), log)))
    flops = [
        _flops_row(
            model, *(results[variant, model, "none", None] for variant in ("NTP", "NITP")), results["MTP", model, "MTP"]
        )
        for model in models
    ]
    memory = [
        {"model": model, "checkpointing": checkpointing, "num_chunks": num_chunks}
        | _memory_row(*(results[variant, model, checkpointing, num_chunks] for variant in ("NTP", "NITP")))
        for model, checkpointing, num_chunks in settings
    ]
    memory += [
        {"model": model, "checkpointing": "none", "num_chunks": None}
        | _memory_row(*(results["MTP", model, variant] for variant in ("NTP", "MTP")))
        for model in models
    ]
    return {"flops": flops, "memory": memory}


def _flops_row(model: str, ntp: Result, nitp: Result, mtp: Result) -> dict[str, Any]:
    per_token = {
        f"{variant.case.variant.lower()}_{name}": getattr(variant.cost, f"{name}_flops") / variant.case.seq_len
        for variant in (ntp, nitp, mtp)
        for name in ("matmul", "attention")
    }
    overhead, paper = _share(nitp.cost.matmul_flops, ntp.cost.matmul_flops), nitp.paper_nitp_flops / nitp.paper_flops
    return {
        "model": model,
        **per_token,
        "overhead": overhead,
        "overhead_with_attention": _share(nitp.cost.flops, ntp.cost.flops),
        "mtp_overhead": _share(mtp.cost.matmul_flops, ntp.cost.matmul_flops),
        "mtp_overhead_with_attention": _share(mtp.cost.flops, ntp.cost.flops),
        # 6 per parameter used, counted from the modules of the model.
        "counts_overhead": nitp.counts.nitp_overhead,
        "paper_flops": nitp.paper_flops,
        "paper_nitp_flops": nitp.paper_nitp_flops,
        "paper_overhead": paper,
        "difference": overhead - paper,
    }


def _memory_row(ntp: Result, other: Result) -> dict[str, Any]:
    return {
        "variant": other.case.variant,
        "ntp_peak_bytes": ntp.cost.peak_bytes,
        "peak_bytes": other.cost.peak_bytes,
        "added_bytes": other.cost.peak_bytes - ntp.cost.peak_bytes,
        "share": _share(other.cost.peak_bytes, ntp.cost.peak_bytes),
        "ntp_state_bytes": ntp.state_bytes,
        "state_bytes": other.state_bytes,
    }


def communication(log: Log = print, layouts: Collection[str] = LAYOUTS) -> Rows:
    """What NITP adds to NTP's communication in a micro-batch of 8,192 tokens, a row per layout, kind and mesh axis.

    Returns:
        Rows of ``layout``, ``model``, those of `trace.as_rows`, ``owner`` (what it carries), and NTP's ``ntp_calls``
        and ``ntp_payload`` of the same kind on the same axis. ``prefetched`` and ``ntp_prefetched`` are FSDP's gathers
        that overlap with work, see `trace.Cost`.
    """
    cases = [
        Case(MODELS[model], variant, **changes)
        for model, changes in (LAYOUTS[layout] for layout in layouts)
        for variant in ("NTP", "NITP")
    ]
    results = list(count_all(cases, log))
    rows = []
    for layout, ntp, nitp in zip(layouts, results[::2], results[1::2]):
        before = {(row["kind"], row["group"]): row for row in as_rows(ntp.cost.collectives)}
        for row in as_rows(added(nitp.cost, ntp.cost)):
            place = row["kind"], row["group"]
            row |= {f"ntp_{name}": before.get(place, {}).get(name, 0) for name in ("calls", "payload")}
            row |= {"ntp_prefetched": ntp.cost.prefetched_gathers, "prefetched": nitp.cost.prefetched_gathers}
            owner = _OWNERS.get(place) or _OWNERS.get((row["kind"], None), "unknown")
            rows.append({"layout": layout, "model": LAYOUTS[layout][0], "owner": owner, **row})
    return rows


def growth(log: Log = print) -> dict[str, Rows]:
    """NITP's shares against the length of sequences, the model dimension and the number of ranks.

    Returns:
        ``seq_len``, ``dim`` and ``num_ranks``: rows of ``series`` (what stays the same), ``x``, and the shares
        ``matmul_flops``, ``flops`` (attention counted), ``peak_bytes``, ``state_bytes`` and ``payload`` (bytes of all
        collectives).
    """
    axes = {"seq_len": _seq_len_cases(), "dim": _dim_cases(), "num_ranks": _num_ranks_cases()}
    cases = [case for points in axes.values() for _, _, *pair in points for case in pair]
    results = count_all(cases, log)
    return {
        axis: [{"series": series, "x": x} | _shares(next(results), next(results)) for series, x, _, _ in points]
        for axis, points in axes.items()
    }


def _pair(model: str, **changes: Any) -> tuple[Case, Case]:
    return tuple(Case(MODELS[model], variant, **changes) for variant in ("NTP", "NITP"))


def _seq_len_cases() -> list[tuple]:
    models = ("dense 3B", "MoE 9B-A1B")
    return [(model, seq_len, *_pair(model, seq_len=seq_len)) for model in models for seq_len in SEQ_LENS]


def _num_ranks_cases() -> list[tuple]:
    return [("dense 3B", num_ranks, *_pair("dense 3B", num_ranks=num_ranks)) for num_ranks in NUM_RANKS]


def _dim_cases() -> list[tuple]:
    """The dense 3B model in other widths: heads of 128 and a feed-forward of 4 dim as there."""
    points = []
    for series, depth_of in (
        ("28 layers", lambda dim: 28),
        ("as many layers as dim / 91", lambda dim: dim * 28 // 2560),
    ):
        for dim in DIMS:
            shape = {
                "dim": dim,
                "hidden_dim": 4 * dim,
                "n_heads": dim // 128,
                "n_kv_heads": dim // 640,
                "n_layers": depth_of(dim),
            }
            points.append((series, dim, *_pair("dense 3B", shape=shape)))
    return points


def _shares(ntp: Result, nitp: Result) -> dict[str, float]:
    names = ("matmul_flops", "flops", "peak_bytes")
    shares = {name: _share(getattr(nitp.cost, name), getattr(ntp.cost, name)) for name in names}
    shares["state_bytes"] = _share(nitp.state_bytes, ntp.state_bytes)
    shares["payload"] = _share(_payload(nitp.cost), _payload(ntp.cost))
    return shares


def _payload(cost: Cost) -> int:
    return sum(traffic.payload for traffic in cost.collectives.values())


def _share(value: float, baseline: float) -> float:
    return value / baseline - 1
