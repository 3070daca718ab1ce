"""What a training run measures, against numpy on the states that hooks see."""

import math
import time

import numpy as np
import pytest
import torch
from helpers import IGNORE, make_config, PackedDataLoader, train
from numpy.testing import assert_allclose
from numpy_geometry import numpy_stats

from nitp_titan.config.parallelism import check_parallelism
from nitp_titan.errors import UserError
from nitp_titan.geometry.settings import GeometryConfig
from nitp_titan.geometry.statistics import sample_pairs
from nitp_titan.step_files import read_records

GEOMETRY = {"enable": True, "interval": 2, "layers": True}
STATES = ["hidden", "target", "projected", *(f"layer_{number}" for number in range(5))]


def shifted(z_BLD):
    """The state one position ahead; the last position has none."""
    return torch.cat([z_BLD[:, 1:], torch.zeros_like(z_BLD[:, :1])], dim=1)


class Witness:
    """Copies of the states of every training pass, by name of the state."""

    def __init__(self, trainer):
        self.states = {name: [] for name in STATES}
        (model,) = trainer.model_parts
        modules = {"hidden": model.norm, "layer_0": model.tok_embeddings, "projected": model.nitp.projector}
        modules |= {f"layer_{int(name) + 1}": layer for name, layer in model.layers.items()}
        for name, module in modules.items():
            module.register_forward_hook(lambda module, inputs, output, name=name: self.keep(name, output))
        model.nitp.target.register_forward_hook(lambda module, inputs, output: self.keep("target", shifted(output[0])))

    def keep(self, name, output):
        if torch.is_grad_enabled():
            self.states[name].append(output.detach().clone())


@pytest.fixture(scope="module")
def measured(assets, tmp_path_factory):
    """Three of four steps of two micro-batches, measured at steps 1 and 2: folder and the states that were there."""
    folder = tmp_path_factory.mktemp("measured")
    training = {"local_batch_size": 2, "global_batch_size": 4, "steps": 4}
    config = make_config(folder, training=training, geometry=GEOMETRY)
    trainer = config.build()
    witness = Witness(trainer)
    batches = trainer.batch_generator(trainer.dataloader)
    for step in range(1, 4):
        trainer.step = step
        trainer.train_step(batches)
    trainer.close()
    return folder, witness.states


def valid_tokens(state: str, step: int) -> np.ndarray:
    """Validity of the step's tokens in the order of training, in plain Python."""
    loader = PackedDataLoader(PackedDataLoader.Config(), dp_world_size=1, dp_rank=0, seq_len=128, local_batch_size=2)
    valid = []
    for index in range(4 * (step - 1), 4 * step):
        _, positions, labels = loader.sample(index)
        for t in range(128):
            continues = t + 1 < 128 and positions[t + 1] == positions[t] + 1
            valid.append(labels[t] != IGNORE and (continues or state not in ("target", "projected")))
    return np.array([bool(v) for v in valid])


def tokens_of(state: str, states: dict, step: int) -> np.ndarray:
    """[tokens, dim] of a step of two micro-batches, each seen in one piece or in chunks of the sequence."""
    pieces = states[state]
    per_step = len(pieces) // 3
    per_batch = per_step // 2
    mine = pieces[(step - 1) * per_step : step * per_step]
    batches = [torch.cat(mine[i : i + per_batch], dim=1) for i in (0, per_batch)]
    return torch.cat(batches).flatten(0, 1).float().numpy()


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("state", STATES)
def test_a_measured_state_equals_numpy_on_all_valid_tokens_of_the_step(measured, state, step):
    folder, states = measured
    (record,) = [record for record in read_records(folder / "geometry.jsonl") if record["step"] == step]
    x, valid = tokens_of(state, states, step), valid_tokens(state, step)
    assert record[state]["tokens"] == valid.sum()
    for stat, expected in numpy_stats(x[valid]).items():
        assert_allclose(record[state][stat], expected, rtol=1e-4, err_msg=stat)
    sequences, positions = sample_pairs(torch.full((4,), 128), 1024, seed=step)
    index = (sequences * 128 + positions).numpy()
    first, second = np.split(index, 2)
    counted = valid[first] & valid[second]
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(x[first], x[second])]
    assert_allclose(record[state]["cosine_sampled"], np.array(cosines)[counted].mean(), rtol=1e-4, atol=1e-6)


def test_the_step_s_line_and_record_have_rank_and_cosine_where_measured(measured):
    folder, _ = measured
    geometry = {record["step"]: record for record in read_records(folder / "geometry.jsonl")}
    records = read_records(folder / "metrics.jsonl")
    assert list(geometry) == [1, 2] and [record["step"] for record in records] == [1, 2, 3]
    for record in records[:2]:
        hidden = geometry[record["step"]]["hidden"]
        assert (record["effective_rank"], record["cosine"]) == (hidden["effective_rank"], hidden["cosine"])
    assert "effective_rank" not in records[2]


def test_measuring_changes_no_bit_of_the_training(measured, tmp_path):
    folder, _ = measured
    train(make_config(tmp_path, training={"local_batch_size": 2, "global_batch_size": 4, "steps": 4}))
    keys = ("ntp_loss", "nitp_loss", "grad_norm")
    losses = [
        [[record[key] for key in keys] for record in read_records(f / "metrics.jsonl")[:3]] for f in (folder, tmp_path)
    ]
    assert losses[0] == losses[1]
    assert not (tmp_path / "geometry.jsonl").exists()


def test_measuring_takes_less_than_half_a_percent_of_the_time_at_the_default_interval(tmp_path, assets):
    """Every second step measures; the medians of both kinds tell what one measurement costs."""
    training = {"steps": 24, "local_batch_size": 16, "global_batch_size": 16}
    trainer = make_config(tmp_path, training=training, geometry={"enable": True, "interval": 2}).build()
    batches = trainer.batch_generator(trainer.dataloader)
    seconds = []
    for step in range(1, 25):
        trainer.step = step
        started = time.perf_counter()
        trainer.train_step(batches)
        seconds.append(time.perf_counter() - started)
    trainer.close()
    assert [record["step"] for record in read_records(tmp_path / "geometry.jsonl")] == [1, *range(2, 25, 2)]
    plain, measuring = np.median(seconds[2::2]), np.median(seconds[3::2])
    assert (measuring - plain) / GeometryConfig().interval < 0.005 * plain


def test_ntp_alone_is_measured_too_and_keeps_its_weights(tmp_path, assets):
    config = make_config(tmp_path / "on", nitp={"weight": 0.0}, geometry={**GEOMETRY, "interval": 1})
    trainer = train(config)
    plain = train(make_config(tmp_path / "off", nitp={"weight": 0.0}))
    for name, value in trainer.model_parts[0].state_dict().items():
        assert torch.equal(value.full_tensor(), plain.model_parts[0].state_dict()[name].full_tensor()), name
    assert list(trainer.model_parts[0].state_dict()) == list(plain.model_parts[0].state_dict())
    records = read_records(tmp_path / "on/geometry.jsonl")
    assert [sorted(record) for record in records] == [sorted(["step", "hidden", *STATES[3:]])] * 3


def test_the_cosine_regulariser_has_no_target_and_no_projection(tmp_path, assets):
    nitp = {"objective": "cosine_regularizer", "weight": 1.0}
    train(make_config(tmp_path, nitp=nitp, geometry={"enable": True}, training={"steps": 1}))
    (record,) = read_records(tmp_path / "geometry.jsonl")
    assert sorted(record) == ["hidden", "step"]


def test_validation_geometry_sees_the_same_validation_tokens_each_time_and_in_every_variant(tmp_path, assets):
    """One run trains with a learning rate of zero: its geometry must not move."""
    records = {}
    for name, nitp in (("ntp", {"weight": 0.0}), ("nitp", {})):
        validator = make_config(tmp_path / name, generated_data=False).validator
        config = make_config(
            tmp_path / name,
            nitp=nitp,
            generated_data=False,
            geometry={"enable": True, "interval": 100, "validation_batches": 2},
            validator={"enable": True, "freq": 1, "steps": 3, "dataloader": validator.dataloader},
        )
        config.optimizer.param_groups[0].optimizer_kwargs["lr"] = 1e-30
        trainer = config.build()
        trainer.train()
        trainer.close()
        records[name] = read_records(tmp_path / name / "validation_geometry.jsonl")
        assert [record["step"] for record in records[name]] == [1, 2, 3]
        assert records[name][0]["hidden"] == records[name][2]["hidden"]
    assert sorted(records["nitp"][0]) == ["hidden", "projected", "step", "target"]
    # Both variants start from the same weights, and see the same tokens.
    assert records["ntp"][0]["hidden"] == records["nitp"][0]["hidden"]
    assert records["nitp"][0]["hidden"]["tokens"] == 2 * 4 * 128


def test_states_that_are_not_finite_do_not_stop_a_run(tmp_path, assets, caplog):
    """Spoilt while they are measured only: the loss is finite and training continues."""
    trainer = make_config(tmp_path, geometry={"enable": True, "layers": True}, training={"steps": 1}).build()
    observe = trainer.tracker.observe
    trainer.tracker.observe = lambda state, x, *rest, **options: observe(
        state, x.detach() * (math.inf if state == "layer_2" else 1.0), *rest, **options
    )
    trainer.step = 1
    with caplog.at_level("WARNING"):
        trainer.train_step(trainer.batch_generator(trainer.dataloader))
    trainer.close()
    (record,) = read_records(tmp_path / "geometry.jsonl")
    assert "layer_2" not in record and "layer_3" in record
    assert "geometry of layer_2: not finite; left out." in caplog.text


def test_a_state_without_a_valid_token_is_left_out(tmp_path, assets, caplog):
    config = make_config(tmp_path, documents="single", geometry={"enable": True}, training={"steps": 1})
    with caplog.at_level("WARNING"):
        train(config)
    (record,) = read_records(tmp_path / "geometry.jsonl")
    assert sorted(record) == ["hidden", "step"] and record["hidden"]["tokens"] > 0
    assert "geometry of target: no valid token was seen; left out." in caplog.text


def test_pairs_are_of_different_sequences_and_follow_the_seed():
    sequences, positions = sample_pairs(torch.full((3,), 16), 500, seed=5)
    first, second = sequences.chunk(2)
    assert (first != second).all() and set(sequences.tolist()) == {0, 1, 2}
    assert set(positions.tolist()) == set(range(16))
    again, other = sample_pairs(torch.full((3,), 16), 500, seed=5), sample_pairs(torch.full((3,), 16), 500, seed=6)
    assert torch.equal(again[0], sequences) and not torch.equal(other[0], sequences)
    sequences, positions = sample_pairs(torch.full((1,), 16), 500, seed=5)
    first, second = positions.chunk(2)
    assert (first != second).all() and not sequences.any()


@pytest.mark.parametrize("key, value", [("interval", 0), ("num_pairs", 0), ("validation_batches", -1), ("seed", -1)])
def test_settings_out_of_range_are_named(key, value):
    with pytest.raises(UserError, match=rf"\[geometry\] {key} = {value}, but it must be at least"):
        GeometryConfig(**{key: value})


def test_the_ptrr_balancer_is_refused(tmp_path):
    parallelism = {"context_parallel_degree": 2, "context_parallel_load_balancer": "ptrr"}
    config = make_config(
        tmp_path, nitp={"weight": 0.0}, geometry={"enable": True}, parallelism=parallelism, training={"seq_len": 256}
    )
    with pytest.raises(UserError, match=r"'ptrr' reorders tokens by their mask, so \[geometry\] cannot tell"):
        check_parallelism(config, 2)
