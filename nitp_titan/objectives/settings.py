"""Settings of the auxiliary objective. Imports no torch: recipes are read without it."""

from dataclasses import dataclass
from typing import Literal, TYPE_CHECKING

from nitp_titan.errors import invalid, UserError

if TYPE_CHECKING:
    from torchtitan.config import ParallelismConfig

LOSS_NAMES = ("cosine", "mse", "smooth_l1", "kl")
"""Keys of `distances.DISTANCES`, which needs torch."""


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
        known = ":" in self.loss or self.loss in LOSS_NAMES
        self._require("weight", 0 <= self.weight < float("inf"), "a finite number, at least 0")
        self._require("target_layer", self.target_layer is None or self.target_layer >= 0, "at least 0")
        self._require("start_step", self.start_step >= 0, "at least 0")
        self._require("projector_width", 0 < self.projector_width < float("inf"), "above 0")
        self._require("loss", known, f"one of {', '.join(LOSS_NAMES)} or module:function", LOSS_NAMES)

    def _require(self, key: str, holds: bool, allowed: str, choices: tuple[str, ...] = ()) -> None:
        if not holds:
            raise invalid("nitp", key, getattr(self, key), allowed, choices)

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
        self._require("target_layer", self.target_layer <= num_layers, allowed)
        least = f"at least {1 / dim:.2g}, one hidden unit of the projector for the model's {dim} dimensions"
        self._require("projector_width", self.projector == "none" or round(self.projector_width * dim) >= 1, least)

    def untrained_warning(self, steps: int) -> str | None:
        """A line for a run of so many steps that never trains the objective; None for any other."""
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
