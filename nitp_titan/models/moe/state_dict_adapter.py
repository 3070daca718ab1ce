"""Names and shapes of the MoE family's weights in ``Ernie4_5_MoeForCausalLM``."""

from typing import Any

from torchtitan.models.common import ComplexRoPE
from torchtitan.models.qwen3 import Qwen3Model
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter

_EXPERT_BIAS = "moe.expert_bias_E"
_HF_EXPERT_BIAS = "mlp.moe_statics.e_score_correction_bias"


class Ernie4_5MoeStateDictAdapter(Qwen3StateDictAdapter):
    """TorchTitan's qwen3 adapter, plus shared experts and selection bias, less the norms of queries and keys."""

    def __init__(self, model_config: Qwen3Model.Config, hf_assets_path: str | None):
        super().__init__(model_config, hf_assets_path)
        self.from_hf_map = {
            hf: titan for hf, titan in self.from_hf_map.items() if "q_norm" not in hf and "k_norm" not in hf
        }
        shared = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        self.from_hf_map |= {
            f"model.layers.{{}}.mlp.shared_experts.{hf}.weight": f"layers.{{}}.moe.shared_experts.{titan}.weight"
            for hf, titan in shared.items()
        }
        self.from_hf_map[f"model.layers.{{}}.{_HF_EXPERT_BIAS}"] = f"layers.{{}}.{_EXPERT_BIAS}"

    def _validate_hf_rope_config(self, expected_rope_cls: type) -> None:
        # Interleaved on both sides, so queries and keys need no permutation.
        super()._validate_hf_rope_config(ComplexRoPE.Config)

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The bias is [1, experts] there and [experts] here."""
        hf = super().to_hf(state_dict)
        return {name: value.unsqueeze(0) if name.endswith(_HF_EXPERT_BIAS) else value for name, value in hf.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        titan = super().from_hf(hf_state_dict)
        return {name: value.squeeze(0) if name.endswith(_EXPERT_BIAS) else value for name, value in titan.items()}
