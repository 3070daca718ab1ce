"""A run resumes under another layout: the same data in every step, and the losses of one rank."""

import json
from collections import Counter
from pathlib import Path

import pytest
from processes import free_port, warm_ranks

from nitp_titan.step_files import read_records

STEPS = 6
FSDP, TP, CP, PP, EP = {"shard": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"shard": 2, "ep": 2}
# Layouts in which a run trains one equal part of its steps after the other; None is one rank.
RUNS = {
    "dense/one": [None],
    "dense/one, FSDP 2, TP 2, PP 2, CP 2, one": [None, FSDP, TP, PP, CP, None],
    "moe/one": [None],
    "moe/FSDP 2, FSDP 2 x EP 2, one": [FSDP, EP, None],
}
MOVES = [name for name, layouts in RUNS.items() if len(layouts) > 1]


def _parts() -> list[dict]:
    runs = [
        {
            "name": name,
            "model": name.partition("/")[0],
            "steps": STEPS * (index + 1) // len(layouts),
            "layout": layout,
            "port": free_port(),
        }
        for name, layouts in RUNS.items()
        for index, layout in enumerate(layouts)
    ]
    # Every layout draws other initial weights, so all runs start from a seed checkpoint.
    seeds = [{"name": f"seeds/{model}", "model": model, "steps": 0, "port": free_port()} for model in ("dense", "moe")]
    return [{**seed, "layout": None} for seed in seeds] + runs


@pytest.fixture(scope="module")
def folder(assets, tmp_path_factory) -> Path:
    """Run folders of all runs, trained in one launch."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "runs.json").write_text(json.dumps(_parts()))
    rows = [json.loads(line) for line in (assets / "validation.jsonl").read_text().splitlines()[:5]]
    short = [{"text": row["text"][: 400 * (index + 1)]} for index, row in enumerate(rows)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    result = warm_ranks(2, "tests/distributed/elastic.py", str(folder), str(folder / "runs.json"))
    errors = [path.read_text() for path in folder.glob("**/*.error")]
    assert result.returncode == 0 and not errors, "\n".join([*errors, result.stderr[-3000:]])
    return folder


def _sequences(run: Path) -> dict[int, Counter]:
    """Hashes of the sequences of each step, over all ranks."""
    steps: dict[int, Counter] = {}
    # Ranks of tensor, context and pipeline parallelism read the same sequences.
    by_rank = [[tuple(json.loads(line)) for line in path.read_text().splitlines()] for path in run.glob("sequences.*")]
    for step in range(1, STEPS + 1):
        found = [Counter(digest for at, digest in rows if at == step) for rows in by_rank]
        steps[step] = found[0] if len(found) == 1 or found[0] == found[1] else found[0] + found[1]
    return steps


@pytest.mark.parametrize("name", MOVES)
def test_a_run_that_changes_its_layout_loses_and_repeats_no_sequence(folder, name):
    expected = _sequences(folder / f"{name.partition('/')[0]}/one")
    assert all(sum(sequences.values()) == 4 for sequences in expected.values())
    assert len(set().union(*expected.values())) == 4 * STEPS
    assert _sequences(folder / name) == expected


@pytest.mark.parametrize("name", MOVES)
def test_a_run_that_changes_its_layout_has_the_figures_of_one_rank(folder, name):
    one, ours = (read_records(folder / run / "metrics.jsonl") for run in (f"{name.partition('/')[0]}/one", name))
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
    for record, expected in zip(ours, one):
        assert record["tokens"] == expected["tokens"] and record["lr"] == expected["lr"]
        for key in ("ntp_loss", "nitp_loss"):
            assert record[key] == pytest.approx(expected[key], abs=2e-5), (record["step"], key)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3), record["step"]


@pytest.mark.parametrize("name", MOVES)
def test_a_run_that_changes_its_layout_validates_the_sequences_of_one_rank(folder, name):
    """The first step and the last one of every part."""
    one, ours = (
        {record["step"]: record["ntp_loss"] for record in read_records(folder / run / "validation.jsonl")}
        for run in (f"{name.partition('/')[0]}/one", name)
    )
    parts = len(RUNS[name])
    assert list(one) == [1, STEPS] and list(ours) == sorted(
        {1, *(STEPS * (part + 1) // parts for part in range(parts))}
    )
    for step, loss in one.items():
        assert ours[step] == pytest.approx(loss, abs=2e-5)
