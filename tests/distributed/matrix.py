"""Every layout that the suite trains, and the one-rank layout that it must equal."""

from dataclasses import dataclass
from typing import Any

from helpers import PackedDataLoader
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC

from nitp_titan.machine.cpu import DENSE_ATTENTION

# What each seed checkpoint is of. Pipelines need untied embeddings; tied ones are tested besides.
MODELS = {
    "dense": {"family": "llama3", "flavor": "debug_untied"},
    "tied": {"family": "llama3", "flavor": "debug"},
    "moe": {"family": "moe", "flavor": "debug"},
    "qwen3": {"family": "qwen3", "flavor": "debug"},
    "qwen3_moe": {"family": "qwen3", "flavor": "debug_moe"},
    "deepseek_v3": {"family": "deepseek_v3", "flavor": "debug"},
    "gpt_oss": {"family": "gpt_oss", "flavor": "debug"},
}
FAMILIES = [model for model in MODELS if model not in ("dense", "tied", "moe")]
# Weight 20 makes NITP's gradient the larger part; a wrong one could not hide.
_NITP = {"weight": 20.0, "target_layer": 2}
_GEOMETRY = {"enable": True, "interval": 1, "num_pairs": 64}
_TYPECHECKED = {"debug": {"spmd_typechecking": True}}
_TRAINING = {"steps": 2, "global_batch_size": 4, "local_batch_size": 4, "seq_len": 256}
DEGREES = {
    "tp": "tensor_parallel_degree",
    "cp": "context_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "ep": "expert_parallel_degree",
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "schedule": "pipeline_parallel_schedule",
    "balancer": "context_parallel_load_balancer",
    "sequence_parallel": "enable_sequence_parallel",
    "backend": "spmd_backend",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One training run of two optimizer steps."""

    name: str
    """``<model>/<what it is>``."""

    ranks: int
    sections: dict[str, Any]
    """Changes to the debug recipe, as `helpers.make_config` takes them."""

    reference: str
    """Layout on one rank with the same results; its own name if it is one."""

    entries: dict[str, str]
    """Rows of the table in tests/README.md and the label in each; empty for a reference."""

    gradient: float
    """Relative tolerance of the float64 gradient norms."""

    loss: float
    """Absolute tolerance of the losses."""

    control: str | None
    """What the worker breaks on purpose, see `layouts.py`."""

    @property
    def model(self) -> str:
        return self.name.partition("/")[0]


LAYOUTS: dict[str, Layout] = {}


def _add(
    name: str,
    ranks: int,
    technique: str,
    *,
    reference: str = "one",
    batch: int = 4,
    gradient: float = 1e-6,
    loss: float = 1e-5,
    control: str | None = None,
    label: str | None = None,
    also: dict[str, str] | None = None,
    num_chunks: int | None = None,
    **settings,
) -> None:
    """Register a layout: sections of a config, or degrees by the short names of `DEGREES`.

    Args:
        label: entry in the row of the technique; by default what the name says.
        also: other rows that it holds for, and its entries there.
    """
    model, _, what = name.partition("/")
    parallelism = {DEGREES[key]: settings.pop(key) for key in list(settings) if key in DEGREES}
    nitp = {**_NITP, **settings.pop("nitp", {})}
    sections = {
        "model": MODELS[model],
        "nitp": nitp,
        "training": {**_TRAINING, "local_batch_size": batch, **settings.pop("training", {})},
        "parallelism": parallelism,
        # With NTP alone the layers are not measured, so that the model is TorchTitan's own.
        "geometry": {**_GEOMETRY, "layers": nitp["weight"] > 0},
        **({} if num_chunks is None else {"loss": {"num_chunks": num_chunks}}),
        **settings,
    }
    LAYOUTS[name] = Layout(
        name=name,
        ranks=ranks,
        sections=sections,
        reference=f"{model}/{reference}",
        entries={technique: label or what, **(also or {})} if technique else {},
        gradient=gradient,
        loss=loss,
        control=control,
    )


def _one(name: str, **settings) -> None:
    """Register a reference."""
    _add(name, 1, "", reference=name.partition("/")[2], **settings)


def _validated() -> None:
    """The probe of the validation data, which is made of whole batches of the same samples in every layout."""
    technique = "geometry of validation tokens"
    validator = {"validator": {"enable": True, "steps": 2, "dataloader": PackedDataLoader.Config()}}
    _one("dense/one, validated", **validator)
    for what, degrees in (
        ("FSDP 2", {"batch": 2}),
        ("TP 2", {"tp": 2}),
        ("CP 2 head-tail", {"cp": 2}),
        ("PP 2 1F1B", {"pp": 2, "schedule": "1F1B"}),
    ):
        name = f"dense/{what}, validated"
        _add(name, 2, technique, reference="one, validated", label=what, **degrees, **validator)


def _parallelisms() -> None:
    _add("dense/accumulation", 1, "gradient accumulation", label="1 rank", batch=1)
    _add("dense/FSDP 2, accumulation", 2, "gradient accumulation", label="FSDP 2", batch=1)
    _add("dense/PP 2, accumulation", 2, "gradient accumulation", label="PP 2", batch=2, pp=2)
    _add("dense/DDP 2", 2, "data parallel", batch=2, replicate=2, shard=1)
    _add("dense/FSDP 2", 2, "data parallel", also={"SPMD typechecking": "FSDP 2"}, batch=2, **_TYPECHECKED)
    _add("dense/HSDP 2 x 2", 4, "data parallel", batch=1, replicate=2, shard=2)
    _add("tied/FSDP 2", 2, "data parallel", label="FSDP 2 with tied embeddings", batch=2)
    _add("dense/TP 2", 2, "tensor parallel", also={"SPMD typechecking": "TP 2"}, tp=2, **_TYPECHECKED)
    _add("dense/TP 2 without sequence parallel", 2, "tensor parallel", tp=2, sequence_parallel=False)
    _add("dense/FSDP 2 x TP 2", 4, "tensor parallel", batch=2, tp=2)
    _add("tied/FSDP 2 x TP 2", 4, "tensor parallel", label="FSDP 2 x TP 2 with tied embeddings", batch=2, tp=2)
    _add("dense/CP 2 head-tail", 2, "context parallel", also={"SPMD typechecking": "CP 2"}, cp=2, **_TYPECHECKED)
    _add("dense/CP 2 without balancer", 2, "context parallel", cp=2, balancer=None)
    _add("dense/FSDP 2 x CP 2", 4, "context parallel", batch=2, cp=2)
    _add("dense/CP 2 x TP 2", 4, "context parallel", cp=2, tp=2)
    _add("tied/CP 2 x TP 2", 4, "context parallel", label="CP 2 x TP 2 with tied embeddings", cp=2, tp=2)
    _one("dense/one of 512 tokens", training={"seq_len": 512})
    _add("dense/CP 4", 4, "context parallel", reference="one of 512 tokens", training={"seq_len": 512}, cp=4)
    for schedule in ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        _add(f"dense/PP 2 {schedule}", 2, "pipeline parallel", pp=2, schedule=schedule)
    _add("dense/PP 2 x FSDP 2", 4, "pipeline parallel", batch=2, pp=2)
    zero_bubble = {"pp": 2, "schedule": "InterleavedZeroBubble"}
    _add("dense/PP 2 InterleavedZeroBubble x FSDP 2", 4, "pipeline parallel", batch=2, **zero_bubble)
    _add("dense/PP 2 x TP 2", 4, "pipeline parallel", pp=2, tp=2)
    _add("dense/PP 2 x CP 2", 4, "pipeline parallel", pp=2, cp=2)
    _one("dense/one, NTP alone", nitp={"weight": 0.0})
    _add(
        "dense/PP 2 ZBVZeroBubble, NTP alone",
        2,
        "pipeline parallel",
        label="PP 2 ZBVZeroBubble with NTP alone",
        reference="one, NTP alone",
        nitp={"weight": 0.0},
        pp=2,
        schedule="ZBVZeroBubble",
    )

    _one("moe/one, NTP alone", nitp={"weight": 0.0})
    _add("moe/accumulation", 1, "gradient accumulation", label="1 rank", batch=1)
    _add("moe/FSDP 2", 2, "data parallel", also={"SPMD typechecking": "FSDP 2"}, batch=2, **_TYPECHECKED)
    _add("moe/TP 2", 2, "tensor parallel", tp=2)
    _add("moe/typechecked TP 2", 2, "SPMD typechecking", label="TP 2", tp=2, **_TYPECHECKED)
    _add("moe/CP 2 head-tail", 2, "context parallel", cp=2)
    _add("moe/typechecked CP 2", 2, "SPMD typechecking", label="CP 2", cp=2, **_TYPECHECKED)
    _add("moe/PP 2 1F1B", 2, "pipeline parallel", pp=2)
    _add("moe/PP 2 ZBVZeroBubble", 2, "pipeline parallel", pp=2, schedule="ZBVZeroBubble")
    _add("moe/PP 2 x EP 2", 4, "pipeline parallel", batch=2, pp=2, ep=2)
    _add("moe/EP 2", 2, "expert parallel", also={"SPMD typechecking": "EP 2"}, batch=2, ep=2, **_TYPECHECKED)
    _add(
        "moe/EP 2, NTP alone",
        2,
        "expert parallel",
        label="EP 2 with NTP alone",
        reference="one, NTP alone",
        batch=2,
        nitp={"weight": 0.0},
        ep=2,
    )
    _add("moe/EP 4", 4, "expert parallel", batch=1, ep=4)
    _add("moe/EP 2 x TP 2", 4, "expert parallel", batch=2, ep=2, tp=2)


def _variants() -> None:
    """Where the implicit token comes from under pipelining, and the paper's ablations."""
    for layer, stage in ((0, "embedding"), (1, "first stage"), (4, "last stage")):
        reference, nitp = f"one, target layer {layer}", {"target_layer": layer}
        _one(f"dense/{reference}", nitp=nitp)
        _add(
            f"dense/PP 2, target in the {stage}",
            2,
            "target layer's stage",
            label=stage,
            reference=reference,
            nitp=nitp,
            pp=2,
        )
    # Of four stages the second holds layers 2 and 3.
    _add(
        "dense/PP 2, target in a middle stage",
        2,
        "target layer's stage",
        label="middle stage",
        pp=2,
        schedule="Interleaved1F1B",
    )
    for variant, nitp, layouts in (
        ("no stop-gradient", {"stop_gradient": False}, ("FSDP", "TP")),
        ("cosine regularizer", {"objective": "cosine_regularizer"}, ("FSDP", "TP", "CP", "PP")),
        ("no projector", {"projector": "none"}, ("TP", "CP")),
        ("same position", {"temporal_shift": 0}, ("CP", "PP")),
    ):
        _one(f"dense/one, {variant}", nitp=nitp)
        for name in layouts:
            degree = {"batch": 2} if name == "FSDP" else {name.lower(): 2}
            _add(
                f"dense/{name} 2, {variant}",
                2,
                f"objective: {variant}",
                label=f"{name} 2",
                reference=f"one, {variant}",
                nitp=nitp,
                **degree,
            )


def _techniques() -> None:
    alone = {"FSDP 2": {"batch": 2}, "TP 2": {"tp": 2}, "CP 2": {"cp": 2}}
    for model in ("dense", "moe"):
        for what, policy, chunks in (("full AC", FullAC, 1), ("selective AC", SelectiveAC, 8)):
            _add(
                f"{model}/{what}, chunks: {chunks}",
                2,
                "activation checkpointing",
                label=what,
                also={"chunks of the loss": str(chunks)},
                batch=2,
                num_chunks=chunks,
                activation_checkpoint=policy.Config(),
            )
        for name, degrees in alone.items():
            _add(f"{model}/full_dtensor, {name}", 2, "full_dtensor", label=name, backend="full_dtensor", **degrees)
    _add(
        "dense/full_dtensor, PP 2 x FSDP 2",
        4,
        "full_dtensor",
        label="PP 2 x FSDP 2",
        batch=2,
        backend="full_dtensor",
        pp=2,
    )
    _add(
        "dense/full_dtensor, FSDP 2 x CP 2",
        4,
        "full_dtensor",
        label="FSDP 2 x CP 2",
        batch=2,
        backend="full_dtensor",
        cp=2,
    )

    # Traced grouped products take bfloat16 only, so that the reference's experts do too.
    bfloat16_experts = {"imports": [DENSE_ATTENTION]}
    _one("moe/one, bfloat16 experts", override=bfloat16_experts)
    compiled = {"enable": True, "components": ["model", "loss"]}
    _add("dense/compile", 2, "torch.compile of model and loss", batch=2, compile=compiled)
    _add(
        "moe/compile",
        2,
        "torch.compile of model and loss",
        reference="one, bfloat16 experts",
        batch=2,
        gradient=5e-4,
        compile=compiled,
    )
    budget = MemoryBudgetAC.Config(memory_budget=0.3)
    _add(
        "dense/memory-budget AC",
        2,
        "activation checkpointing",
        batch=2,
        compile=compiled,
        activation_checkpoint=budget,
    )


def _low_precision() -> None:
    """Techniques that round: equal to one rank within their own precision."""
    float8 = {"enable": True, "emulate": True}
    for model, gradient, loss in (("dense", 5e-3, 2e-3), ("moe", 5e-2, 2e-2)):
        rounded = {"batch": 2, "gradient": gradient, "loss": loss}
        _one(f"{model}/one, float8", float8=float8)
        _add(f"{model}/float8", 2, "float8 (emulated)", reference="one, float8", float8=float8, **rounded)
        bfloat16 = {"mixed_precision_param": "bfloat16"}
        _add(f"{model}/bfloat16", 2, "bfloat16 mixed precision", training=bfloat16, **rounded)
        unconverted = {**float8, "filter_fqns": ["lm_head", "nitp.projector"]}
        _one(f"{model}/one, float8 but the projector", float8=unconverted)
        _add(
            f"{model}/float8 but the projector",
            2,
            "float8 (emulated)",
            reference="one, float8 but the projector",
            float8=unconverted,
            **rounded,
        )


def _families() -> None:
    for model in FAMILIES:
        if model != "gpt_oss":
            _add(f"{model}/FSDP 2 x TP 2", 4, "FSDP 2 x TP 2", batch=2, tp=2)
        if model != "qwen3":
            _add(f"{model}/EP 2", 2, "EP 2", batch=2, ep=2)
            _add(f"{model}/EP 2 x TP 2", 4, "EP 2 x TP 2", batch=2, ep=2, tp=2)


def _documents() -> None:
    cp = {"CP 2 without balancer": {"cp": 2, "balancer": None}, "CP 2 head-tail": {"cp": 2}}
    whole = "documents as long as the sequence"
    # On two data-parallel ranks the second has no valid position in the first step and no label in the next.
    odd = "no valid position in every second sequence", "no label in every second sequence"
    for kind, technique, others in (
        ("unlike", whole, odd),
        ("single", "documents of one token", ()),
        ("first half", "no valid position in half of each sequence", ()),
    ):
        layouts = {"dense/FSDP 2": {"batch": 2}} | {f"dense/{name}": degrees for name, degrees in cp.items()}
        if kind != "first half":
            layouts |= {"dense/TP 2": {"tp": 2}, "dense/PP 2": {"pp": 2}, "moe/EP 2": {"batch": 2, "ep": 2}}
        for model in {name.partition("/")[0] for name in layouts}:
            _one(f"{model}/one, {kind}", documents=kind)
        for name, degrees in layouts.items():
            label = name.partition("/")[2]
            reference = f"one, {kind}"
            also = dict.fromkeys(others, label)
            _add(
                f"{name}, {kind}",
                2,
                technique,
                label=label,
                also=also,
                reference=reference,
                documents=kind,
                **degrees,
            )


def _controls() -> None:
    """Broken on purpose: each must differ from one rank."""
    _add("dense/PP 2 resharded", 2, "", control="resharded", pp=2, schedule="ZBVZeroBubble")
    _add("dense/CP 2 without the halo", 2, "", control="no halo", cp=2)
    _add("dense/CP 2 with a shard-local shift", 2, "", control="shard-local shift", cp=2)
    _add("dense/FSDP 2 without the divide factor", 2, "", control="no divide factor", batch=2)


def _wrong_upstream() -> None:
    """What `layout.check_parallelism` refuses because TorchTitan trains it wrongly, without NITP too."""
    ntp = {"reference": "one, NTP alone", "nitp": {"weight": 0.0}, "control": "no check"}
    _one("gpt_oss/one, NTP alone", nitp={"weight": 0.0})
    _add("gpt_oss/TP 2 without EP, NTP alone", 2, "", tp=2, **ntp)
    _add("dense/full_dtensor, PP 2 x CP 2, NTP alone", 4, "", backend="full_dtensor", pp=2, cp=2, **ntp)


for _model in MODELS:
    _one(f"{_model}/one")
_parallelisms()
_variants()
_techniques()
_low_precision()
_families()
_documents()
_validated()
_controls()
_wrong_upstream()
