"""Geometry of every state of a model against transformers and numpy on the states themselves."""

import numpy as np
import pytest
import torch
from geometry_of_models import assert_same_stats, DIM, FAMILIES, LAYERS, make, states_of, tokens_of, VOCABULARY
from numpy.testing import assert_allclose
from numpy_geometry import Largest, numpy_stats
from transformers import (
    PretrainedConfig,
)

from nitp_titan.evaluation.hidden_states import Collector, decoder_layers, measure
from nitp_titan.geometry.statistics import sample_pairs
from nitp_titan.objectives.sites import HIDDEN, layer_site


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_of_every_state_equal_numpy_on_the_states(family):
    model, sequences = make(family), tokens_of(7, 21, 3, 40, 1)
    found, left_out = measure(model, sequences, batch_size=2, num_pairs=64)
    expected = states_of(model, sequences)
    assert left_out == [] and list(found) == [HIDDEN, *(f"layer_{n}" for n in range(LAYERS + 1))]
    for state, x in expected.items():
        assert found[state]["tokens"] == len(x) == 72
        for stat, value in numpy_stats(x).items():
            assert_allclose(found[state][stat], value, rtol=1e-5, atol=1e-7, err_msg=f"{state} {stat}")


def test_the_sampled_cosine_is_that_of_the_drawn_pairs():
    model, sequences = make("llama, tied"), tokens_of(5, 9, 2)
    found, _ = measure(model, sequences, batch_size=2, num_pairs=50, seed=3)
    numbers, positions = sample_pairs(torch.tensor([5, 9, 2]), 50, 3)
    at = (torch.tensor([0, 5, 14])[numbers] + positions).numpy()
    for state, x in states_of(model, sequences).items():
        units = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
        expected = (units[at[:50]] * units[at[50:]]).sum(1).mean()
        assert_allclose(found[state]["cosine_sampled"], expected, rtol=1e-5, atol=1e-7, err_msg=state)


def test_names_of_states_are_those_of_training():
    found, _ = measure(make("qwen3"), tokens_of(3, 3), batch_size=2, num_pairs=1)
    assert list(found) == [HIDDEN, *(layer_site(n) for n in range(LAYERS + 1))]


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_batch_size_nor_padding_changes_a_figure(family):
    model, sequences = make(family), tokens_of(7, 21, 3, 40, 1)
    alone, _ = measure(model, sequences, batch_size=1, num_pairs=64)
    for batch_size in (2, 5, 64):
        assert_same_stats(measure(model, sequences, batch_size=batch_size, num_pairs=64)[0], alone, 1e-5)


def test_a_document_without_tokens_changes_nothing():
    model, sequences = make("gpt2"), tokens_of(7, 3)
    expected, _ = measure(model, sequences, batch_size=1, num_pairs=8)
    for batch_size in (1, 3):
        found, _ = measure(model, [sequences[0], *tokens_of(0), sequences[1]], batch_size=batch_size, num_pairs=8)
        assert_same_stats(found, expected, 1e-5)


def test_pairs_are_tokens_of_different_sequences_all_alike():
    lengths = torch.tensor([1, 0, 4, 2])
    sequences, positions = sample_pairs(lengths, 40_000, 0)
    assert (positions >= 0).all() and (positions < lengths[sequences]).all()
    first, second = (torch.tensor([0, 1, 1, 5])[sequences] + positions).chunk(2)
    assert (sequences[:40_000] != sequences[40_000:]).all()
    # 7 * 6 ordered pairs, without 4 * 3 and 2 * 1 of the same sequence.
    counts = torch.bincount(first * 7 + second, minlength=49)
    assert (counts > 0).sum() == 28
    assert_allclose(counts[counts > 0], 40_000 / 28, rtol=0.15)


def test_a_cone_is_told_from_a_ball():
    model, sequences = make("llama, tied"), tokens_of(60, 60, 60)
    ball, _ = measure(model, sequences, batch_size=2, num_pairs=256)
    with torch.no_grad():
        model.get_input_embeddings().weight += 1.0
    cone, _ = measure(model, sequences, batch_size=2, num_pairs=256)
    assert abs(ball["layer_0"]["cosine"]) < 0.02 and abs(ball["layer_0"]["cosine_sampled"]) < 0.05
    assert cone["layer_0"]["cosine"] > 0.99 and cone["layer_0"]["cosine_sampled"] > 0.99
    # A constant moves the mean only, which the covariance is free of.
    assert_allclose(cone["layer_0"]["effective_rank"], ball["layer_0"]["effective_rank"], rtol=1e-3)
    assert ball["layer_0"]["rankme"] > 25 > 10 > cone["layer_0"]["rankme"]


def test_fewer_directions_have_a_lower_rank():
    model, sequences = make("llama, tied"), tokens_of(60, 60, 60)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 4:] = 0
    found, _ = measure(model, sequences, batch_size=2, num_pairs=16)
    assert 3 < found["layer_0"]["effective_rank"] <= 4


def test_memory_does_not_grow_with_the_text_and_no_logits_are_made():
    model, largest = make("llama, tied"), []
    for number in (4, 40):
        with Largest() as seen:
            measure(model, tokens_of(*[50] * number), batch_size=4, num_pairs=8)
        largest.append(seen.bytes)
    assert largest[0] == largest[1] < 50 * VOCABULARY * 4
    collectors = []
    for number in (2, 60):
        collector = Collector(sample_pairs(torch.full((number,), 5), 8, 0))
        for start in range(0, number, 2):
            collector.expect(start, torch.ones(2, 5, dtype=torch.bool))
            collector.see("hidden", torch.ones(2, 5, DIM))
        tensors = [*collector.moments["hidden"].tensors(), collector.pair_states["hidden"]]
        collectors.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert collectors[0] == collectors[1]


def test_states_that_are_not_finite_are_named_and_the_others_measured():
    model = make("llama, tied")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    found, left_out = measure(model, tokens_of(9, 9), batch_size=2, num_pairs=4)
    assert list(found) == ["layer_0", "layer_1"]
    assert left_out == [f"{state}: not finite; left out." for state in ("hidden", "layer_2", "layer_3")]


def test_without_a_list_of_layers_the_last_hidden_state_is_measured_alone():
    model, sequences = make("llama, tied"), tokens_of(9, 9)
    expected, _ = measure(model, sequences, batch_size=2, num_pairs=4)
    model.config.num_hidden_layers = LAYERS + 5
    found, left_out = measure(model, sequences, batch_size=2, num_pairs=4)
    assert found == {HIDDEN: expected[HIDDEN]}
    assert left_out == ["its layers are not in a list of num_hidden_layers modules; left out."]


class TwoLists(torch.nn.Module):
    """A decoder whose layers hold lists of as many modules as there are layers."""

    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig(num_hidden_layers=2)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])})
            for _ in range(2)
        )


def test_the_outermost_list_is_the_layers():
    decoder = TwoLists()
    assert decoder_layers(decoder) is decoder.layers


def test_a_state_that_was_not_seen_at_every_token_has_no_figures():
    collector = Collector(sample_pairs(torch.tensor([3, 3]), 4, 0))
    collector.expect(0, torch.ones(2, 3, dtype=torch.bool))
    collector.see("layer_1", torch.ones(2, 3, 8))
    collector.see("layer_2", torch.ones(6, 8))
    with pytest.raises(ValueError, match="seen at 6 tokens, not 12"):
        collector.stats("layer_1", 12)
    with pytest.raises(ValueError, match="does not show it"):
        collector.stats("layer_2", 6)
