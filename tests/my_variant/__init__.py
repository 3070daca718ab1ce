"""A Llama with wider feed-forwards, and the angle between projected state and implicit token as the NITP loss."""

import dataclasses
from functools import partial

import torch

from nitp_titan.models import llama3
from nitp_titan.models.llama3 import hf_config  # noqa: F401  # what it is in transformers

_SHAPE = dict(dim=96, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=384, vocab_size=4096, tied=True)
FLAVORS = {"wide": partial(llama3.llama, **_SHAPE)}


def model_registry(flavor, attn_backend="flex"):
    spec = llama3.model_registry("debug", attn_backend)
    return dataclasses.replace(spec, flavor=flavor, model=FLAVORS[flavor](attn_backend=attn_backend))


def angular_loss(prediction, target):
    """Angle as a fraction of a half turn, [batch, length]."""
    cosine = torch.cosine_similarity(prediction, target, dim=-1)
    return torch.acos(cosine.clamp(-0.999999, 0.999999)) / torch.pi
