"""Ranks that would run different things find out at the start."""

import dataclasses
import time

import pytest
from helpers import make_config

from nitp_titan.config.build import tables_of
from nitp_titan.config.tables import flat_settings
from nitp_titan.runs import provenance, ranks
from nitp_titan.runs.run_folder import plan_resume


@pytest.fixture
def start(assets, tmp_path):
    return plan_resume(make_config(tmp_path / "run", generated_data=False))


def test_ranks_that_read_another_recipe_or_run_other_code_end_in_seconds(torchrun, tmp_path):
    started = time.monotonic()
    done = torchrun(
        2,
        "tests/unlike_ranks.py",
        *("--recipe", "debug/nitp_debug", "--train-config", "cpu", "--dump_folder", str(tmp_path / "run")),
        *("--training.steps", "5", "--training.local_batch_size", "8"),
    )
    seconds = time.monotonic() - started
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and seconds < 60, seconds
    assert lines == [
        "error: the ranks of this run do not agree. rank 1: [training] steps = 7, rank 0 has 5; nitp_titan code = "
        f"'0123456789ab', rank 0 has '{provenance.code_hash()[:12]}'. All of them must read the same files."
    ]
    assert "Building" not in done.stderr
    assert not (tmp_path / "run/resolved.toml").exists() and not (tmp_path / "run/starts.jsonl").exists()


def test_the_facts_of_a_node_are_code_versions_tokenizer_data_and_the_checkpoint(start, assets, tmp_path):
    facts = ranks.local_facts(start)
    assert facts["nitp_titan code"] == provenance.code_hash()[:12]
    assert facts["torchtitan"] == "0.3.0" and facts["python"].startswith("3.")
    for name in ("train.jsonl", "validation.jsonl", "tokenizer.json"):
        size = (assets / name).stat().st_size
        assert facts[f"content of assets/stdlib/{name}"].startswith(f"{size:,} bytes, hash ")
    assert facts["checkpoint to resume from"] is None and facts["--overwrite"] is False
    settings = flat_settings(tables_of(make_config(tmp_path / "run", generated_data=False)))
    assert settings["[training] steps"] == 3 and settings["[nitp] weight"] == 1.0


def test_a_node_that_sees_another_checkpoint_differs(start):
    """As where the run folder is not on a disk that all nodes share."""
    first, mine = (ranks.local_facts(each) for each in (dataclasses.replace(start, from_step=20), start))
    assert ranks.differences(first, mine) == "checkpoint to resume from = not set, rank 0 has 20"


def test_the_first_rank_of_every_node_follows_the_plan_of_rank_0(start, assets, tmp_path, monkeypatch):
    """Each of them draws an id of its own for Weights & Biases, and may log there."""
    of_rank_0 = dataclasses.replace(start, wandb_id="of rank 0", finished=True, data=None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "check_ranks_agree", lambda settings, facts: ["a", "b"])
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", lambda found, src: found.__setitem__(0, of_rank_0))
    config = make_config(tmp_path / "run", generated_data=False)
    assert start.wandb_id != "of rank 0" and ranks.agree(config, start) == (["a", "b"], of_rank_0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"torch": "2.14.0"}, "torch = '2.14.0', rank 0 has '2.14.1'"),
        ({"torch": None, "new": 1}, "torch = not set, rank 0 has '2.14.1'; new = 1, rank 0 has not set"),
        ({name: 0 for name in "abcde"}, "{}; and 2 more"),
    ],
)
def test_a_difference_is_said_with_both_values(change, said):
    first = {"torch": "2.14.1", "[training] steps": 100}
    three = "; ".join(f"{name} = 0, rank 0 has not set" for name in "abc")
    assert ranks.differences(first, {**first, **change}) == said.format(three)


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ([1], "rank 1"),
        ([1, 2], "ranks 1, 2"),
        ([3, 4, 5, 6], "ranks 3 to 6"),
        ([1, 3, 5, 7], "ranks 1, 3, 5, 7"),
        ([1, 3, 5, 7, 8, 15], "ranks 1, 3, 5, 7 and 2 more"),
    ],
)
def test_ranks_that_differ_alike_are_named_together(which, said):
    by_rank = ["torch = 'a'" if rank in which else "" for rank in range(16)]
    assert ranks.message(by_rank) == (
        f"the ranks of this run do not agree. {said}: torch = 'a'. All of them must read the same files."
    )


def test_many_groups_of_ranks_are_one_line():
    text = ranks.message(["", *(f"x = {rank}" for rank in range(1, 9))])
    assert "rank 1: x = 1; rank 2: x = 2; rank 3: x = 3; and 5 more. All" in text and "\n" not in text
