"""FSDP2 on two real ranks against one rank, from one seed checkpoint."""

import dataclasses
import json

import pytest
from conftest import free_port
from helpers import make_config

WORKER = "tests/distributed/layouts.py"
# Weight 20 makes NITP's gradient the larger part; a wrong one could not hide.
SECTIONS = {"nitp": {"weight": 20.0}, "training": {"steps": 2, "global_batch_size": 8, "local_batch_size": 8}}


def _sections(**training):
    return {**SECTIONS, "training": {**SECTIONS["training"], **training}}


LAYOUTS = {
    1: {"one": _sections(), "one_accumulated": _sections(local_batch_size=2)},
    2: {"fsdp": _sections(local_batch_size=4), "fsdp_accumulated": _sections(local_batch_size=1)},
}


@pytest.fixture(scope="module")
def results(torchrun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    seed = make_config(folder / "seed", **SECTIONS)
    checkpoint = dataclasses.replace(seed.checkpoint, enable=True, create_seed_checkpoint=True)
    trainer = dataclasses.replace(seed, checkpoint=checkpoint).build()
    trainer.checkpointer.save(curr_step=0, last_step=True)
    trainer.close()
    figures = {}
    for num_ranks, layouts in LAYOUTS.items():
        described = {name: {"port": free_port(), "sections": sections} for name, sections in layouts.items()}
        (folder / "layouts.json").write_text(json.dumps(described))
        done = torchrun(num_ranks, WORKER, str(folder), str(folder / "layouts.json"))
        assert done.returncode == 0, done.stderr[-4000:]
        figures |= {name: json.loads((folder / f"{name}.json").read_text()) for name in layouts}
    return figures


@pytest.mark.parametrize("name", ["one_accumulated", "fsdp", "fsdp_accumulated"])
def test_losses_and_gradients_equal_those_of_one_rank(results, name):
    one, other = results["one"], results[name]
    assert len(one["norms"]) == len(other["norms"]) == 2
    for expected, ours in zip(one["norms"], other["norms"]):
        for group in ("projector", "rest"):
            assert expected[group] > 0
            assert ours[group] == pytest.approx(expected[group], rel=1e-6), group
    for expected, ours in zip(one["records"], other["records"]):
        assert ours["tokens"] == expected["tokens"]
        for key in ("ntp_loss", "nitp_loss"):
            assert ours[key] == pytest.approx(expected[key], abs=1e-5), key
    assert other["weights"] == pytest.approx(one["weights"], rel=1e-7)


def test_the_second_step_differs_from_the_first(results):
    """The comparison covers an optimizer step: its figures move."""
    first, second = results["one"]["norms"]
    assert abs(first["projector"] - second["projector"]) > 1e-3 * first["projector"]
