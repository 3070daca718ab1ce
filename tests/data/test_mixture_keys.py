"""The keys that name text sources and mixtures, and what is said of a wrong one."""

import gzip

import pyarrow
import pyarrow.parquet
import pytest
from recipe_files import GOOD_RECIPE, GOOD_TRAIN_CONFIG

from nitp_titan.data.loader import check_dataset, TextDataLoader
from nitp_titan.data.mixtures import MIXTURES, TextSource
from nitp_titan.errors import UserError
from nitp_titan.runs.run_folder import write_resolved
from nitp_titan.training.trainer import load_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": "papr_like"}, r"\[t\] mixture = 'papr_like' is not registered. Did you mean 'paper_like'\?"),
        (
            {"mixture": "c4", "dataset_path": "x", "split": "test"},
            r"\[t\] has dataset_path, split and mixture: give either one source by its own keys, or mixture",
        ),
        ({"mixture": "c4", "sources": [TextSource()]}, r"\[t\] has mixture and sources: give either"),
        ({"sources": [TextSource(dataset="a/b"), TextSource()]}, r"\[t\] sources\[1\].dataset_path is missing"),
        ({"sources": [TextSource(dataset="a/b", weight=0.0)]}, r"\[t\] sources\[0\].weight = 0.0, but it must be"),
        ({"sources": [TextSource(dataset="a/b", weight=-1.0)]}, r"sources\[0\].weight = -1.0, but it must be a finite"),
        ({"sources": [TextSource(dataset="a/b", weight=float("nan"))]}, r"sources\[0\].weight = nan, but it must be"),
        ({"sources": [TextSource(dataset="a/b", weight=float("inf"))]}, r"sources\[0\].weight = inf, but it must be"),
        ({"dataset": "jsonl"}, r"\[t\] dataset = 'jsonl' is neither .* Did you mean 'json'\?"),
        ({"dataset": "a/b", "text_field": []}, r"\[t\] text_field = \[\] names no field"),
        ({"dataset": "a/b", "num_workers": 2}, r"\[t\] num_workers = 2, but it must be 0 or 1"),
    ],
)
def test_a_wrong_source_is_named(options, message):
    with pytest.raises(UserError, match=message):
        check_dataset(TextDataLoader.Config(**options), "t")


def _zipped(content: bytes) -> bytes:
    """The same bytes at any time, which name the test."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"no table", "dataset_path: .*x.parquet is not a parquet file that can be read"),
        ("x.jsonl.gz", b"not gzipped", "dataset_path: .*x.jsonl.gz, line 1: no JSON object but 'not gzipped'"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "cut off"}', mtime=0)[:-12], "x.jsonl.gz, line 1 or later: the "),
        (
            "x.jsonl.gz",
            gzip.compress(b'{"txt": ""}', mtime=0),
            "text_field = 'text': .*x.jsonl.gz, line 1: there is no field 'text'. Did you mean 'txt'",
        ),
    ],
)
def test_a_wrong_file_of_a_mixture_is_named(tmp_path, monkeypatch, name, content, message):
    (tmp_path / name).write_bytes(content)
    kind = "parquet" if name.endswith("parquet") else "json"
    monkeypatch.setitem(
        MIXTURES, "mine", [TextSource(dataset="a/b"), TextSource(dataset=kind, dataset_path=str(tmp_path))]
    )
    with pytest.raises(UserError, match=rf"\[t\] mixture = 'mine', source 1: .*{message}"):
        check_dataset(TextDataLoader.Config(mixture="mine"), "t")


def test_a_parquet_table_without_the_field_or_without_rows_is_named(tmp_path):
    empty = pyarrow.Table.from_pylist([], schema=pyarrow.schema([("text", pyarrow.string())]))
    for table, message in (
        (empty, "dataset_path = '.*' holds no document"),
        (pyarrow.Table.from_pylist([{"body": "x"}]), "text_field = 'text': .*x.parquet has no column 'text'. Choose"),
        (pyarrow.Table.from_pylist([{"text": 1}]), "x.parquet, row group 1, row 1: 'text' is 1 and not a text"),
    ):
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(UserError, match=message):
            check_dataset(TextDataLoader.Config(dataset="parquet", dataset_path=str(tmp_path)))


TABLES = """
[[dataloader.sources]]
dataset = "parquet"
dataset_path = "x"
weight = 3
text_field = ["problem", "solution"]
[[dataloader.sources]]
dataset = "allenai/c4"
subset = "en"
streaming = true
[validator.dataloader]
mixture = "c4_validation"
"""


@pytest.fixture
def load(tmp_path):
    def load(tables):
        (tmp_path / "recipe.toml").write_text(GOOD_RECIPE)
        (tmp_path / "machine.toml").write_text(GOOD_TRAIN_CONFIG + tables)
        return load_config(tmp_path / "recipe.toml", tmp_path / "machine.toml")

    return load


def test_sources_come_from_a_train_config_and_come_back_from_the_resolved_recipe(load, tmp_path):
    config = load(TABLES)
    assert config.dataloader.sources == [
        TextSource(dataset="parquet", dataset_path="x", weight=3.0, text_field=["problem", "solution"]),
        TextSource(dataset="allenai/c4", subset="en", streaming=True),
    ]
    assert config.validator.dataloader.mixture == "c4_validation"
    write_resolved(config, tmp_path / "run")
    again = load_config(tmp_path / "run/resolved.toml", None)
    assert (again.dataloader, again.validator) == (config.dataloader, config.validator)


def test_a_wrong_key_of_a_source_is_named_with_its_file(load):
    with pytest.raises(UserError, match=r"machine.toml: \[dataloader\] sources\[1\] has no key 'wait'.*'weight'"):
        load(TABLES.replace("streaming", "wait"))
    with pytest.raises(UserError, match=r"machine.toml: \[dataloader\] sources\[0\].weight = 'much', but it must be"):
        load(TABLES.replace("weight = 3", 'weight = "much"'))
