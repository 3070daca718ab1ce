"""A model family of tests: debug models with one thing changed. Named in `[model] family` by its import path."""

import dataclasses

from torchtitan.models.common import ComplexRoPE, CosSinRoPE

from nitp_titan.models import (
    deepseek_v3,
    gpt_oss,
    llama3,
    moe,
    qwen3,
)


def _scaled(config: type, **scaling):
    def change(model):
        for layer in model.layers:
            layer.attention.rope = config.Config(
                dim=layer.attention.rope.dim, max_seq_len=4096, theta=10000.0, **scaling
            )

    return change


def _yarn(config: type, **other):
    return _scaled(config, scaling="yarn", rope_factor=8.0, original_seq_len=64, **other)


def _deepseek_yarn(model):
    _yarn(ComplexRoPE)(model)
    for layer in model.layers:
        layer.attention.mscale = 0.7


def _routing(**settings):
    def change(model):
        for layer in model.layers:
            if layer.moe is not None:
                layer.moe.router = dataclasses.replace(layer.moe.router, **settings)

    return change


def _unlike_layers(model):
    model.layers[1].attention_norm.eps = 1e-3


def _latent_eps(model):
    for layer in model.layers:
        layer.attention.kv_norm.eps = 1e-5


def _theta(model):
    _scaled(ComplexRoPE)(model)


def _wider(model):
    for layer in model.layers:
        for linear in (layer.feed_forward.w1, layer.feed_forward.w3):
            linear.out_features = 320
        layer.feed_forward.w2.in_features = 320


def _taller(model):
    """190 MB of float32 in tensors of at most 8 MB."""
    shape = dict(dim=512, n_layers=16, n_heads=8, n_kv_heads=4, hidden_dim=1536, vocab_size=4096, tied=True)
    taller = llama3.llama(attn_backend="flex", **shape)
    for field in dataclasses.fields(model):
        setattr(model, field.name, getattr(taller, field.name))


_LLAMA_SCALING = dict(scaling="llama", scaling_factor=8.0, original_max_position_embeddings=64)
_CHANGED = {
    "llama_scaled": (llama3, "debug", _scaled(ComplexRoPE, **_LLAMA_SCALING)),
    "llama_yarn": (llama3, "debug", _yarn(ComplexRoPE)),
    "llama_theta": (llama3, "debug", _theta),
    "llama_wider": (llama3, "debug", _wider),
    "llama_tall": (llama3, "debug", _taller),
    "llama_unlike_layers": (llama3, "debug", _unlike_layers),
    "qwen3_yarn": (qwen3, "debug", _yarn(CosSinRoPE)),
    "deepseek_v3_yarn": (deepseek_v3, "debug", _deepseek_yarn),
    "deepseek_v3_softmax": (deepseek_v3, "debug", _routing(score_func="softmax")),
    "deepseek_v3_eps": (deepseek_v3, "debug", _latent_eps),
    "gpt_oss_yarn": (gpt_oss, "debug", _yarn(CosSinRoPE, truncate=False)),
    "moe_raw_weights": (moe, "debug", _routing(route_norm=False)),
    "moe_sigmoid": (moe, "debug", _routing(score_func="sigmoid")),
    "moe_yarn": (moe, "debug", _yarn(ComplexRoPE)),
}
FLAVORS = {flavor: None for flavor in _CHANGED}
_FAMILY_OF_CLASS = {"Llama3Model": llama3, "DeepSeekV3Model": deepseek_v3, "GptOssModel": gpt_oss}


def model_registry(flavor, attn_backend="flex"):
    family, base, change = _CHANGED[flavor]
    spec = family.model_registry(base, attn_backend)
    change(spec.model)
    return dataclasses.replace(spec, name=family.__name__.rpartition(".")[2], flavor=flavor)


def hf_config(model):
    is_moe = any(layer.moe is not None for layer in model.layers)
    family = _FAMILY_OF_CLASS.get(type(model)._owner.__name__, moe if is_moe else qwen3)
    return family.hf_config(model)
