"""Names and shapes of GPT-OSS weights in ``GptOssForCausalLM``."""

from typing import Any

from torchtitan.models.gpt_oss import GptOssModel
from torchtitan.models.gpt_oss.state_dict_adapter import GptOssStateDictAdapter

_EXPERTS, _HF_EXPERTS = "layers.{}.moe.routed_experts.inner_experts", "model.layers.{}.mlp.experts"


class UnquantizedGptOssStateDictAdapter(GptOssStateDictAdapter):
    """Experts as transformers holds them.

    TorchTitan 0.3.0 maps names that its experts no longer have, and leaves out what it finds no name for.
    """

    def __init__(self, model_config: GptOssModel.Config, hf_assets_path: str | None):
        super().__init__(model_config, hf_assets_path)
        self.from_hf_map = {hf: titan for hf, titan in self.from_hf_map.items() if ".mlp.experts." not in hf} | {
            f"{_HF_EXPERTS}.gate_up_proj": f"{_EXPERTS}.mlp1_weight_EGD",
            f"{_HF_EXPERTS}.gate_up_proj_bias": f"{_EXPERTS}.mlp1_bias_EG",
            f"{_HF_EXPERTS}.down_proj": f"{_EXPERTS}.mlp2_weight_EDF",
            f"{_HF_EXPERTS}.down_proj_bias": f"{_EXPERTS}.mlp2_bias_ED",
        }

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The weights of experts are [experts, in, out] there and [experts, out, in] here."""
        return _transposed(super().to_hf(state_dict), ("gate_up_proj", "down_proj"))

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return _transposed(super().from_hf(hf_state_dict), ("mlp1_weight_EGD", "mlp2_weight_EDF"))


def _transposed(state_dict: dict[str, Any], endings: tuple[str, ...]) -> dict[str, Any]:
    return {name: value.transpose(1, 2) if name.endswith(endings) else value for name, value in state_dict.items()}
