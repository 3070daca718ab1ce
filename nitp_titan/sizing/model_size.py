"""Parameters and FLOPs, counted from a built model."""

from dataclasses import dataclass

from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import MoE

from nitp_titan.objectives.export import TRAINING_PREFIX
from nitp_titan.objectives.parallelize import expert_parameters, matmul_parameters, modules_of_type, share_used


@dataclass(frozen=True)
class Counts:
    """Sizes of a model, and FLOPs of training it on one token (forward and backward)."""

    parameters: int
    """Parameters of the deployed model: without the projector."""

    activated_parameters: int
    """Parameters that one token uses; both embeddings counted."""

    projector_parameters: int

    flops: int
    """Of the backbone's matrix multiplications, 6 per parameter used (the paper's convention, App. G)."""

    attention_flops: int
    """Of the attention scores and their values, causality not deducted (TorchTitan's convention)."""

    nitp_flops: int
    """Of the projector."""

    @property
    def nitp_overhead(self) -> float:
        """NITP's FLOPs as a fraction of the backbone's, as in App. G."""
        return self.nitp_flops / self.flops


def count_model(model: Decoder, seq_len: int) -> Counts:
    """Count a built model, on any device.

    Args:
        model: a decoder, with or without the NITP module, not parallelized.
        seq_len: tokens of a sequence, which attention's FLOPs grow with.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    projector = sum(size for name, size in sizes.items() if name.startswith(TRAINING_PREFIX))
    total = sum(sizes.values()) - projector
    idle = sum(expert_parameters(moe) * (1 - share_used(moe)) for moe in modules_of_type(model, MoE))
    return Counts(
        parameters=total,
        activated_parameters=round(total - idle),
        projector_parameters=projector,
        flops=round(6 * (matmul_parameters(model) - projector)),
        attention_flops=sum(_attention_flops(layer.attention, seq_len) for layer in model.config.layers),
        nitp_flops=6 * projector,
    )


def paper_flops(model: Decoder.Config) -> tuple[int, int]:
    """FLOPs per token of the backbone and of NITP by the paper's formulas, whatever the model really has.

    Backbone: L (18 d^2 + 18 k d d_e) + 6 V d, with k experts per token, the shared one included, of width d_e; k d_e is
    the width of a dense model's feed-forward. The last layer stands for all. NITP: 72 d^2 + 18 d.

    Source: App. G.
    """
    last, dim = model.layers[-1], model.dim
    if last.moe is None:
        width = last.feed_forward.w1.out_features
    else:
        width = (last.moe.router.top_k + 1) * last.moe.routed_experts.inner_experts.hidden_dim
    backbone = len(model.layers) * (18 * dim**2 + 18 * dim * width) + 6 * model.vocab_size * dim
    return backbone, 72 * dim**2 + 18 * dim


def _attention_flops(attention, seq_len: int) -> int:
    if attention is None:
        return 0
    # Two products of 2 n_heads dim seq_len FLOPs, scores and values, three times with the backward.
    return 3 * 2 * attention.n_heads * sum(_head_dims(attention)) * seq_len


def _head_dims(attention) -> tuple[int, int]:
    """Dimensions of a head's queries and of its values, which differ in latent attention."""
    if hasattr(attention, "qk_nope_head_dim"):
        return attention.qk_nope_head_dim + attention.qk_rope_head_dim, attention.v_head_dim
    dim = getattr(attention, "head_dim", None) or attention.dim // attention.n_heads
    return dim, dim
