"""Llama models outside of this project: ``LlamaForCausalLM``."""

from typing import Any

from torchtitan.models.llama3 import Llama3Model

from nitp_titan.models.hf_common import dense_hidden_dim, gqa_config, PURE_ROTATION


def hf_config(model: Llama3Model.Config) -> dict[str, Any]:
    """``config.json`` of a model; UserError if its layers differ."""
    architecture = "LlamaForCausalLM"
    return {
        "architectures": [architecture],
        "model_type": "llama",
        **gqa_config(model, architecture, scaling=PURE_ROTATION),
        "intermediate_size": dense_hidden_dim(model, architecture),
        "attention_bias": False,
        "mlp_bias": False,
    }
