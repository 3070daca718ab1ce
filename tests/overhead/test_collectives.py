"""Communication of one rank, counted by kind and mesh axis."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nitp_titan.sizing.trace import (
    added,
    as_rows,
    Collective,
    Cost,
    Traffic,
)


@pytest.fixture(scope="module")
def found():
    run = subprocess.run([sys.executable, Path(__file__).parent / "collectives.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    "world, size, way",
    [
        ("fake", 4, "in_place"),
        ("fake", 4, "functional"),
        ("fake", 4, "in_place, fake"),
        ("fake", 4, "functional, fake"),
        ("gloo", 1, "in_place"),
        ("gloo", 1, "functional"),
    ],
)
def test_collectives_are_counted_by_kind_with_the_bytes_of_their_larger_side(found, world, size, way):
    whole, part = size * 8 * 4, 8 * 4
    payloads = {
        "all_gather": whole,
        "reduce_scatter": whole,
        "all_to_all": whole,
        "all_reduce": part,
        "broadcast": part,
    }
    rows = found[world][way]
    assert {row["kind"]: row["payload"] for row in rows} == payloads
    assert {(row["group"], row["num_ranks"], row["calls"]) for row in rows} == {("world", size, 1)}


def test_a_collective_names_its_mesh_axis(found):
    row = {"kind": "all_reduce", "group": "tp", "num_ranks": 2, "calls": 1, "payload": 32}
    assert found["fake"]["axis"] == [row]


def test_added_communication_is_a_difference():
    gather, reduce = Collective("all_gather", "dp", 8), Collective("all_reduce", "tp", 2)
    one = Cost(0, 0, 0, {gather: Traffic(2, 30)}, 0)
    other = Cost(0, 0, 0, {gather: Traffic(3, 50), reduce: Traffic(1, 4)}, 0)
    assert added(other, one) == {gather: Traffic(1, 20), reduce: Traffic(1, 4)}
    assert added(one, other) == {gather: Traffic(-1, -20), reduce: Traffic(-1, -4)}
    assert [row["payload"] for row in as_rows(added(other, one))] == [20, 4]
