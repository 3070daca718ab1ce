"""Tiny models of several families of transformers, and their states by hand."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.testing import assert_allclose
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nitp_titan.objectives.sites import HIDDEN

DIM, LAYERS, VOCABULARY = 32, 3, 4160
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": DIM, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
EXPERTS = {"moe_intermediate_size": 16, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
FAMILIES = {
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "ernie4_5_moe": lambda: Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**SIZES, **EXPERTS, use_bias=False)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, bos_token_id=0, eos_token_id=1)),
}
DOCUMENTS = [
    "import os",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "A document that is longer than the others, so that all of them are padded up to its length.",
    "x",
    "class Path:\n    pass",
]


def make(family: str):
    """A seeded model whose norms are no identities and whose biases are not zero."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln_" in name), std=0.3)
    return model


def tokens_of(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (n,), generator=generator, dtype=torch.int32) for n in lengths]


def states_of(model, sequences: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    """States of all tokens, sequence by sequence without padding; the last block's raw output is the norm's input."""
    norm = next(module for name, module in model.named_modules() if name in ("model.norm", "transformer.ln_f"))
    raw: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda module, args: raw.append(args[0]))
    with torch.no_grad():
        passes = [model(ids[None].long(), output_hidden_states=True).hidden_states for ids in sequences]
        hook.remove()
        assert all(torch.equal(norm(x), states[-1]) for x, states in zip(raw, passes))
    columns = zip(*([*states[:-1], x, states[-1]] for x, states in zip(raw, passes)))
    names = [*(f"layer_{number}" for number in range(LAYERS + 1)), HIDDEN]
    return {name: torch.cat(column, dim=1)[0].numpy() for name, column in zip(names, columns, strict=True)}


def assert_same_stats(found: dict, expected: dict, rtol: float):
    assert found.keys() == expected.keys()
    for state, stats in expected.items():
        for stat in stats.keys() - {"spectrum"}:
            assert_allclose(found[state][stat], stats[stat], rtol=rtol, atol=1e-8, err_msg=f"{state} {stat}")
