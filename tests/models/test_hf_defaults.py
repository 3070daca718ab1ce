"""What a config.json means where it is silent is what transformers makes of it."""

import copy

import pytest
import transformers

from nitp_titan.models import build_model_spec, hf_config
from nitp_titan.models.hf_defaults import CLASS_DEFAULTS, completed
from nitp_titan.models.settings import ModelConfig

# Shown by the shapes of the tensors, by the number of layers, or by settings of the table.
SHAPES = {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size", "head_dim"}
SHAPES |= {"num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_key_value_heads"}
SHAPES |= {"layer_types", "moe_layer_end_index", "num_nextn_predict_layers"}
NAMES = {"architectures", "model_type", "rope_theta", "rope_scaling"}


def _theirs(settings):
    return transformers.AutoConfig.for_model(**settings).to_dict()


@pytest.mark.parametrize("model_type", CLASS_DEFAULTS)
def test_the_table_has_the_defaults_of_the_installed_transformers(model_type):
    theirs = _theirs({"model_type": model_type})
    assert CLASS_DEFAULTS[model_type] == {key: theirs[key] for key in CLASS_DEFAULTS[model_type]}


@pytest.mark.parametrize("model_type", CLASS_DEFAULTS)
@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 7.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    ],
)
def test_rotary_embeddings_are_completed_as_transformers_does(model_type, rope):
    settings = {"model_type": model_type, **rope}
    # transformers writes into the tables that it is given.
    theirs = _theirs(copy.deepcopy(settings))
    assert completed(settings)["rope_parameters"] == theirs["rope_parameters"]


@pytest.mark.parametrize("family", ["llama3", "qwen3", "deepseek_v3", "gpt_oss", "moe"])
def test_every_setting_that_a_family_writes_is_in_the_table_or_shown_by_shapes(family):
    model = ModelConfig(family=family, flavor="debug")
    settings = hf_config(model, build_model_spec(model))
    assert not settings.keys() - CLASS_DEFAULTS[settings["model_type"]].keys() - SHAPES - NAMES
