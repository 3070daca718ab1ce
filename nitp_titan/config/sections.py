"""Our own settings. Imports no torch: recipes are read without it."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, TYPE_CHECKING

from nitp_titan.errors import nearest, UserError

if TYPE_CHECKING:
    from torchtitan.config import ParallelismConfig

# Keys of `objective.LOSSES`, which needs torch.
LOSS_NAMES = ("cosine", "mse", "smooth_l1", "kl")


@dataclass(kw_only=True, slots=True)
class NITPConfig:
    """Settings of the NITP objective; the defaults are the paper's choices (Tables 3, 7, 8)."""

    weight: float = 0.0
    """Weight lambda of the NITP loss (Eq. 4). 0 switches NITP off: TorchTitan's own model and loss run."""

    target_layer: int | None = None
    """Layer whose output is the implicit token, 1 to the number of layers; 0 is the token embedding (Eq. 2)."""

    objective: Literal["nitp", "cosine_regularizer"] = "nitp"
    """Auxiliary objective: NITP, or the generic cosine regulariser of the paper's ablation, which only
    pushes the hidden states of a sequence apart and uses no target, loss or projector."""

    loss: str = "cosine"
    """Distance between projected state and implicit token: cosine, mse, smooth_l1, kl, or ``module:function`` of
    another package: a function of both, [batch, length, dim] float32, to [batch, length]."""

    temporal_shift: Literal[0, 1] = 1
    """1 compares the state at t with the implicit token t+1; 0 with that of the same position."""

    stop_gradient: bool = True
    """Keep gradients out of the implicit token."""

    start_step: int = 0
    """Step after which the NITP loss is trained; before, it is only measured."""

    projector: Literal["swiglu", "none"] = "swiglu"
    """Projector of the hidden state: SwiGLU d -> width x d -> d without biases, or none."""

    projector_width: float = 4.0
    """Hidden width of the projector as a multiple of the model dimension d."""

    @property
    def enabled(self) -> bool:
        return self.weight > 0

    def __post_init__(self) -> None:
        finite = 0 <= self.weight < float("inf")
        self._require(finite, "weight", "a finite number, at least 0")
        self._require(self.target_layer is None or self.target_layer >= 0, "target_layer", "at least 0")
        self._require(self.start_step >= 0, "start_step", "at least 0")
        self._require(0 < self.projector_width < float("inf"), "projector_width", "above 0")
        known = ":" in self.loss or self.loss in LOSS_NAMES
        self._require(known, "loss", f"one of {', '.join(LOSS_NAMES)} or module:function", nearest_of=LOSS_NAMES)

    def check_model(self, num_layers: int, dim: int) -> None:
        """Raise UserError unless a model of ``num_layers`` layers has the target layer, and its projector a width."""
        if not self.enabled or self.objective != "nitp":
            return
        allowed = f"0 (embedding) to {num_layers}, the model's number of layers"
        if self.target_layer is None:
            raise UserError(
                f"[nitp] target_layer is missing; choose {allowed}. "
                f"The paper takes about a fifth of the depth, here {max(1, round(num_layers / 5))}.",
                table="nitp",
            )
        self._require(self.target_layer <= num_layers, "target_layer", allowed)
        least = f"at least {1 / dim:.2g}, one hidden unit of the projector for the model's {dim} dimensions"
        self._require(self.projector == "none" or round(self.projector_width * dim) >= 1, "projector_width", least)

    def note(self, steps: int) -> str | None:
        """What to know of these settings in a run of so many steps; None for nothing."""
        if not self.enabled or self.start_step < steps:
            return None
        return f"[nitp] start_step = {self.start_step} of {steps} [training] steps: NITP is measured and never trained."

    def check_parallelism(self, parallelism: "ParallelismConfig") -> None:
        """Raise UserError, with the reason, for a parallel layout under which NITP would be wrong."""
        if not self.enabled:
            return
        pp, cp = parallelism.pipeline_parallel_degree, parallelism.context_parallel_degree
        if not self.stop_gradient and self.objective == "nitp" and (pp > 1 or cp > 1):
            raise UserError(
                "[nitp] stop_gradient = false works without pipeline and context parallelism only: "
                "the target's gradient would have to travel back across ranks.",
                table="nitp",
                key="stop_gradient",
            )
        if parallelism.spmd_backend == "partial_dtensor":
            raise UserError(
                "[parallelism] spmd_backend = 'partial_dtensor' hides the mesh that the implicit tokens "
                "are exchanged on; NITP needs 'spmd_types'.",
                table="parallelism",
                key="spmd_backend",
            )
        if cp > 1 and parallelism.context_parallel_load_balancer == "ptrr":
            raise UserError(
                "[parallelism] context_parallel_load_balancer = 'ptrr' reorders tokens by their mask, so the "
                "next token's rank is unknown; NITP needs 'headtail' or 'none'.",
                table="parallelism",
                key="context_parallel_load_balancer",
            )

    def _require(self, condition: bool, name: str, allowed: str, *, nearest_of: tuple[str, ...] = ()) -> None:
        if not condition:
            value = getattr(self, name)
            suggestion = nearest(value, list(nearest_of)) if nearest_of else ""
            suggestion = suggestion if "Did you mean" in suggestion else ""
            raise UserError(f"[nitp] {name} = {value!r}, but it must be {allowed}.{suggestion}", table="nitp", key=name)


@dataclass(kw_only=True, slots=True)
class GeometryConfig:
    """Geometry of the hidden states during training: effective rank and cosine similarity (Section 5, App. D)."""

    enable: bool = False
    """Measure the last hidden state and, with NITP, the implicit target and the projector's output."""

    interval: int = 100
    """Steps between measurements; the first and the last step are measured too."""

    layers: bool = False
    """Measure the embedding's and every layer's output as well; each needs dim^2 numbers more."""

    num_pairs: int = 1024
    """Token pairs sampled for the cosine similarity of App. D; the closed form over all pairs needs none."""

    probe_batches: int = 1
    """Global batches measured at every validation, the same each time and in every arm; 0 measures none."""

    seed: int = 0
    """Seed of the sampled pairs."""

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("num_pairs", 1), ("probe_batches", 0), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise UserError(
                    f"[geometry] {name} = {value!r}, but it must be at least {least}.", table="geometry", key=name
                )


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """What happens at a bad step: one whose loss or gradient, over all ranks, is not finite, or is a spike."""

    max_skipped_steps: int = 0
    """Bad steps that a run may leave out, resumed parts included, before it stops; 0 stops at the first."""

    skip_above: float | None = None
    """Norm of the gradient before clipping above which a step is a spike; none: only what is not finite is bad."""

    def __post_init__(self) -> None:
        self._require(self.max_skipped_steps >= 0, "max_skipped_steps", "at least 0")
        if self.skip_above is not None:
            self._require(0 < self.skip_above < float("inf"), "skip_above", "a finite number above 0, or 'none'")
            self._require(self.max_skipped_steps > 0, "skip_above", "'none' while max_skipped_steps = 0 skips no step")

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise UserError(
                f"[guard] {name} = {getattr(self, name)!r}, but it must be {allowed}.", table="guard", key=name
            )


@dataclass(kw_only=True, slots=True)
class Float8Config:
    """Float8 training of the linear layers through torchao (TorchTitan's Float8LinearConverter)."""

    enable: bool = False
    """Convert the linear layers to float8."""

    recipe_name: Literal["rowwise", "rowwise_with_gw_hp"] = "rowwise"
    """Scaling recipe."""

    filter_fqns: list[str] = dataclasses.field(default_factory=lambda: ["lm_head"])
    """Modules that keep their type; ``nitp.projector`` keeps the projector out of float8."""

    emulate: bool = False
    """Emulate float8 where the hardware lacks it (CPU, eager only)."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model a recipe names. Kept beside the built ``model_spec`` so that it can be written back."""

    family: str = ""
    """Registered family, for example ``llama3``."""

    flavor: str = ""
    """Size within the family."""

    attn_backend: Literal["flex", "varlen"] = "flex"
    """Attention kernels."""

    moe_comm_backend: Literal["standard", "deepep", "hybridep", "minimal_async_ep"] | None = None
    """Token dispatcher of a family with experts; None takes the family's, the all-to-all ``standard``."""


@dataclass(kw_only=True, slots=True)
class MachineConfig:
    """What a train config is written for. Training does not read it; `scripts/recipe.py check` does."""

    num_ranks: int = 1
    """Ranks (GPUs) in all."""

    device: str = "CPU"
    """Name of the device, for its peak FLOPs in TorchTitan's table."""

    device_memory_gib: float | None = None
    """Memory of one device in GiB; None checks nothing."""

    recipes: list[str] = dataclasses.field(default_factory=list)
    """Recipes that it is meant for, as patterns: ``dense/*``."""
