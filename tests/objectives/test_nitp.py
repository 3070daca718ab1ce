"""The model side: capture of the implicit token, gradients, variants of other families."""

import pytest
import torch
from helpers import make_config, parameters, train

from nitp_titan.config.trained import trained
from nitp_titan.errors import UserError
from nitp_titan.objectives.alignment import next_implicit_tokens
from nitp_titan.objectives.settings import NITPConfig
from nitp_titan.objectives.variant import with_nitp

SHALLOW = ("layers.0.", "layers.1.")


@pytest.fixture(scope="module")
def trainers(assets, tmp_path_factory):
    """One step of each variant from the same seed, weight so large that NITP's gradient leads."""
    variants = {
        "default": {},
        "repeated": {},
        "no stop-gradient": {"stop_gradient": False},
        "same position": {"temporal_shift": 0},
        "embedding": {"target_layer": 0},
        "deep": {"target_layer": 4},
        "mse": {"loss": "mse"},
        "no projector": {"projector": "none"},
        "narrow": {"projector_width": 1.0},
        "regularizer": {"objective": "cosine_regularizer"},
        "late": {"start_step": 1},
        "one chunk": {},
    }
    folder = tmp_path_factory.mktemp("variants")
    return {
        name: train(
            make_config(
                folder / name,
                training={"steps": 1},
                nitp={"weight": 20.0, **nitp},
                loss={"num_chunks": 1 if name == "one chunk" else 8},
            )
        )
        for name, nitp in variants.items()
    }


def _gradient(trainer, prefixes=("",)) -> torch.Tensor:
    gradients = parameters(trainer, gradients=True)
    return torch.cat([g.flatten() for name, g in gradients.items() if name.startswith(prefixes)])


def _nitp_loss(trainer) -> float:
    return trainer.loss_fn.losses[:, 1].sum().item()


def test_the_same_settings_give_the_same_gradients_bit_for_bit(trainers):
    assert torch.equal(_gradient(trainers["default"]), _gradient(trainers["repeated"]))


def test_chunks_change_memory_and_not_results(trainers):
    torch.testing.assert_close(_gradient(trainers["default"]), _gradient(trainers["one chunk"]), rtol=1e-4, atol=1e-7)


def test_turning_stop_gradient_off_changes_the_shallow_layers_gradient_and_not_the_loss(trainers):
    on, off = trainers["default"], trainers["no stop-gradient"]
    assert _nitp_loss(on) == pytest.approx(_nitp_loss(off), rel=1e-6)
    difference = _gradient(on, SHALLOW) - _gradient(off, SHALLOW)
    assert difference.norm() > 0.1 * _gradient(on, SHALLOW).norm()
    deep = ("layers.2.", "layers.3.", "norm.", "nitp.")
    torch.testing.assert_close(_gradient(on, deep), _gradient(off, deep), rtol=1e-4, atol=1e-7)


def test_temporal_shift_target_layer_and_loss_change_what_is_compared(trainers):
    values = {name: _nitp_loss(trainers[name]) for name in ("default", "same position", "embedding", "deep", "mse")}
    assert len({round(value, 6) for value in values.values()}) == len(values), values


def test_the_projector_is_there_in_the_width_that_is_asked_for(trainers):
    def size(name):
        return sum(p.numel() for key, p in parameters(trainers[name]).items() if key.startswith("nitp."))

    dim = trainers["default"].model_config.dim
    assert size("default") == 12 * dim**2
    assert size("narrow") == 3 * dim**2
    assert size("no projector") == size("regularizer") == 0


def test_before_the_start_step_only_ntp_is_trained(trainers, assets, tmp_path):
    ntp = train(make_config(tmp_path, training={"steps": 1}, nitp={"weight": 0.0}))
    assert _nitp_loss(trainers["late"]) == pytest.approx(_nitp_loss(trainers["default"]), rel=1e-6)
    backbone = {name: g for name, g in parameters(trainers["late"], gradients=True).items() if "nitp." not in name}
    for name, gradient in parameters(ntp, gradients=True).items():
        assert torch.equal(backbone[name], gradient), name


def _model(config):
    """The NITP model on CPU with the trainer's initialisation, outside any trainer."""
    from nitp_titan.machine import cpu

    spec = trained(config).model_spec
    spec.model.update_from_config(config=config)
    for _, attention, parent, attribute in list(spec.model.traverse(cpu.FlexAttention.Config)):
        setattr(parent, attribute, cpu.dense_flex_attention(attention))
    torch.manual_seed(0)
    model = spec.model.build()
    model.init_states()
    model._skip_lm_head = True
    return model


@pytest.mark.parametrize("target_layer", [0, 1, 3])
def test_the_implicit_token_is_the_raw_output_of_the_target_layer_one_position_ahead(assets, tmp_path, target_layer):
    model = _model(make_config(tmp_path, nitp={"target_layer": target_layer}))
    seen = []
    module = model.tok_embeddings if target_layer == 0 else model.layers[str(target_layer - 1)]
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    final = []
    model.norm.register_forward_hook(lambda module, inputs, output: final.append(output))
    tokens = torch.randint(0, 4096, (1, 128))
    positions = torch.cat([torch.arange(50), torch.arange(78)])[None]
    h_BLD, z_BLD, following_BRD, valid_BL = model(
        tokens, positions=positions, attention_masks=model.get_attention_masks(positions=positions)
    )
    assert torch.equal(h_BLD, final[0])
    assert not z_BLD.requires_grad
    # The very tensor that the next layer reads: nothing is copied.
    assert z_BLD.data_ptr() == seen[0].data_ptr()
    target_BLD = next_implicit_tokens(z_BLD, following_BRD)
    assert torch.equal(target_BLD[:, :-1], seen[0][:, 1:])
    assert (~valid_BL).nonzero().tolist() == [[0, 49], [0, 127]]


def test_no_gradient_reaches_the_shallow_layers_through_the_target(assets, tmp_path):
    for stop_gradient in (True, False):
        model = _model(make_config(tmp_path, nitp={"stop_gradient": stop_gradient, "target_layer": 2}))
        tokens, positions = torch.randint(0, 4096, (1, 128)), torch.arange(128)[None]
        h_BLD, z_BLD, _, _ = model(
            tokens, positions=positions, attention_masks=model.get_attention_masks(positions=positions)
        )
        assert h_BLD.requires_grad
        assert z_BLD.requires_grad is not stop_gradient
        if not stop_gradient:
            z_BLD.square().sum().backward()
            reached = {
                name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and "layers" in name
            }
            assert reached == {"0", "1"}


def test_validation_and_generation_see_the_plain_hidden_state(assets, tmp_path):
    model = _model(make_config(tmp_path))
    tokens, positions = torch.randint(0, 4096, (1, 128)), torch.arange(128)[None]
    masks = model.get_attention_masks(positions=positions)
    with torch.no_grad():
        assert model(tokens, positions=positions, attention_masks=masks).shape == (1, 128, 96)
        model._skip_lm_head = False
        assert model(tokens, positions=positions, attention_masks=masks).shape == (1, 128, 4096)


def test_a_target_layer_outside_the_model_is_refused():
    from torchtitan.models.llama3 import model_registry

    with pytest.raises(UserError, match=r"target_layer = 7, but it must be 0 \(embedding\) to 6"):
        with_nitp(model_registry("debugmodel"), NITPConfig(weight=1.0, target_layer=7))


def test_hugging_face_names_know_no_projector(assets, tmp_path):
    config = make_config(tmp_path)
    model = _model(config)
    spec = trained(config).model_spec
    exported = spec.state_dict_adapter(spec.model, None).to_hf(model.state_dict())
    assert "model.embed_tokens.weight" in exported
    assert not any("nitp" in name or "projector" in name for name in exported)
