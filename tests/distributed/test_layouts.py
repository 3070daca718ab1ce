"""Two real ranks against one rank, from one seed checkpoint: losses, gradients and weights."""

import dataclasses
import json

import pytest
from conftest import free_port
from helpers import make_config

WORKER = "tests/distributed/layouts.py"
# Weight 20 makes NITP's gradient the larger part; a wrong one could not hide.
NITP = {"weight": 20.0}
TRAINING = {"steps": 2, "global_batch_size": 4, "local_batch_size": 4, "seq_len": 256}


def _layout(*, nitp=None, parallelism=None, recipe="debug/nitp_debug", **training):
    sections = {"recipe": recipe, "nitp": {**NITP, **(nitp or {})}, "training": {**TRAINING, **training}}
    return {**sections, "parallelism": parallelism} if parallelism else sections


SHARED = {"stop_gradient": False}
REGULARIZER = {"objective": "cosine_regularizer"}
ONE_RANK = {
    "one": _layout(),
    "one accumulated": _layout(local_batch_size=1),
    "one without stop-gradient": _layout(nitp=SHARED),
    "one regularizer": _layout(nitp=REGULARIZER),
}
TWO_RANKS = {
    "fsdp": _layout(local_batch_size=2),
    "fsdp accumulated": _layout(local_batch_size=1),
    "fsdp without stop-gradient": _layout(nitp=SHARED, local_batch_size=2),
    "fsdp regularizer": _layout(nitp=REGULARIZER, local_batch_size=2),
    "tp": _layout(parallelism={"tensor_parallel_degree": 2}),
    "cp": _layout(parallelism={"context_parallel_degree": 2}),
}
MOE = "debug/nitp_moe_debug"
EP = {"expert_parallel_degree": 2}
ONE_RANK_MOE = {"one": _layout(recipe=MOE), "one ntp": _layout(recipe=MOE, nitp={"weight": 0.0})}
TWO_RANKS_MOE = {
    "fsdp": _layout(recipe=MOE, local_batch_size=2),
    "ep": _layout(recipe=MOE, local_batch_size=2, parallelism=EP),
    "ep ntp": _layout(recipe=MOE, local_batch_size=2, parallelism=EP, nitp={"weight": 0.0}),
}


@pytest.fixture(scope="module")
def results(torchrun, tmp_path_factory):
    return _train(torchrun, tmp_path_factory.mktemp("layouts"), ONE_RANK, TWO_RANKS)


@pytest.fixture(scope="module")
def moe_results(torchrun, tmp_path_factory):
    return _train(torchrun, tmp_path_factory.mktemp("moe_layouts"), ONE_RANK_MOE, TWO_RANKS_MOE)


def _train(torchrun, folder, one_rank, two_ranks):
    seed = make_config(folder / "seed", **one_rank["one"])
    checkpoint = dataclasses.replace(seed.checkpoint, enable=True, create_seed_checkpoint=True)
    trainer = dataclasses.replace(seed, checkpoint=checkpoint).build()
    trainer.checkpointer.save(curr_step=0, last_step=True)
    trainer.close()
    figures = {}
    for num_ranks, layouts in ((1, one_rank), (2, two_ranks)):
        described = {name: {"port": free_port(), "sections": sections} for name, sections in layouts.items()}
        (folder / "layouts.json").write_text(json.dumps(described))
        done = torchrun(num_ranks, WORKER, str(folder), str(folder / "layouts.json"))
        assert done.returncode == 0, done.stderr[-4000:]
        figures |= {name: json.loads((folder / f"{name}.json").read_text()) for name in layouts}
    return figures


def _reference(name: str) -> str:
    kind = name.partition(" ")[2]
    return f"one {kind}" if kind and kind != "accumulated" else "one"


@pytest.mark.parametrize("name", ["one accumulated", *TWO_RANKS])
def test_losses_gradients_and_weights_equal_those_of_one_rank(results, name):
    _check_equal(results[_reference(name)], results[name])


@pytest.mark.parametrize("name", TWO_RANKS_MOE)
def test_experts_on_two_ranks_train_as_on_one(moe_results, name):
    # TorchTitan computes experts in bfloat16: ranks that share an expert round their parts of its gradient.
    _check_equal(moe_results[_reference(name)], moe_results[name], tolerance=1e-5)


def test_without_nitp_a_run_has_neither_projector_nor_nitp_loss(moe_results):
    for name in ("one ntp", "ep ntp"):
        assert [norms["projector"] for norms in moe_results[name]["norms"]] == [0.0, 0.0]
        assert all("nitp_loss" not in record for record in moe_results[name]["records"])


def _check_equal(one, other, *, tolerance=1e-6):
    assert len(one["norms"]) == len(other["norms"]) == 2
    for expected, ours in zip(one["norms"], other["norms"]):
        for group in ("projector", "rest"):
            assert ours[group] == pytest.approx(expected[group], rel=tolerance), group
    for expected, ours in zip(one["records"], other["records"]):
        assert ours["tokens"] == expected["tokens"]
        for key in {"ntp_loss", "nitp_loss"} & set(expected):
            assert ours[key] == pytest.approx(expected[key], abs=1e-5), key
    assert other["weights"] == pytest.approx(one["weights"], rel=0.1 * tolerance)


def test_the_comparison_is_not_blind(results):
    """The figures move from step to step, and from variant to variant."""
    first, second = results["one"]["norms"]
    assert abs(first["projector"] - second["projector"]) > 1e-3 * first["projector"] > 0
    rests = [results[name]["norms"][0]["rest"] for name in ("one", "one without stop-gradient", "one regularizer")]
    assert len({round(rest, 3) for rest in rests}) == 3
