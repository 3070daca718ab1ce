"""Assets, data, run folders and disks that cannot be used: one line, and nothing written."""

import gzip
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from outcome import is_one_line, remove, tree

TEXT, TOKENIZER = "assets/stdlib/train.jsonl", "assets/stdlib/tokenizer.json"


def _parquet(rows: list[dict]):
    def write(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema([("body", pyarrow.string())]))
        pyarrow.parquet.write_table(table, path)

    return write


def _bytes(content: bytes):
    return lambda path: path.write_bytes(content)


_GZIP = gzip.compress(b'{"text": "some text"}\n' * 1000)

# Name: the file, what is put in its place, changes of [dataloader], and what the error says.
SURROUNDINGS = {
    "no tokenizer": (
        "assets/stdlib/tokenizer.json",
        None,
        {},
        "hf_assets_path = 'assets/stdlib' holds no tokenizer.json",
    ),
    "a tokenizer that is no JSON": (TOKENIZER, _bytes(b"{"), {}, "holds no tokenizer that loads"),
    "a tokenizer of bytes": (TOKENIZER, _bytes(b"\xff\x00"), {}, "holds no tokenizer that loads"),
    "JSON that is no tokenizer": (TOKENIZER, _bytes(b"{}"), {}, "holds no tokenizer that loads"),
    "settings that are no JSON": ("assets/stdlib/tokenizer_config.json", _bytes(b"["), {}, "no tokenizer that loads"),
    "no end of a document": ("assets/stdlib/tokenizer_config.json", _bytes(b"{}"), {}, "no token that ends a document"),
    "no settings": ("assets/stdlib/tokenizer_config.json", None, {}, "no token that ends a document"),
    "no data": (TEXT, None, {}, f"[dataloader] dataset_path = '{TEXT}' names no file"),
    "empty data": (TEXT, _bytes(b""), {}, f"[dataloader] dataset_path = '{TEXT}' holds no document"),
    "a folder without data": (TEXT, Path.mkdir, {}, f"[dataloader] dataset_path = '{TEXT}' names no file"),
    "a pipe for data": (TEXT, os.mkfifo, {}, f"[dataloader] dataset_path = '{TEXT}' names no file"),
    "data that is not UTF-8": (TEXT, _bytes(b'{"text": "\xff"}\n'), {}, "train.jsonl, line 1: byte 0xff at 11, which"),
    "a list for a document": (TEXT, _bytes(b"[1]\n"), {}, "train.jsonl, line 1: a list [1] and not an object"),
    "no such field": (TEXT, _bytes(b'{"txt": "x"}\n'), {}, f"text_field = 'text': {TEXT}, line 1"),
    "another field": (TEXT, _bytes(b'{"text": "x"}\n'), {"text_field": "txet"}, "Did you mean 'text'?"),
    "a number for text": (TEXT, _bytes(b'{"text": 3}\n'), {}, f"dataset_path: {TEXT}, line 1: 'text' is 3"),
    "gzip that is none": ("x.jsonl.gz", _bytes(b"plain"), {"dataset_path": "x.jsonl.gz"}, "line 1: no JSON object"),
    "gzip cut short": ("x.jsonl.gz", _bytes(_GZIP[:12]), {"dataset_path": "x.jsonl.gz"}, "line 1 or later"),
    "empty parquet": ("x.parquet", _parquet([]), {"dataset": "parquet", "dataset_path": "x.parquet"}, "no document"),
    "parquet that is none": (
        "x.parquet",
        _bytes(b"PAR1"),
        {"dataset": "parquet", "dataset_path": "x.parquet"},
        "x.parquet is not a parquet file that can be read",
    ),
    "parquet without the field": (
        "x.parquet",
        _parquet([{"body": "x"}]),
        {"dataset": "parquet", "dataset_path": "x.parquet"},
        "[dataloader] text_field = 'text': x.parquet has no column 'text'. Choose from: body.",
    ),
    "too many workers": (
        TEXT,
        _bytes(b'{"text": "x"}\n'),
        {"num_workers": 2},
        "num_workers = 2, but it must be 0 or 1",
    ),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_missing_and_broken_assets_are_one_line_that_names_the_setting(project, entry, machine, tmp_path, name):
    file, write, dataloader, message = SURROUNDINGS[name]
    train_config = machine(dataloader=dataloader)
    shutil.copytree(project / "assets/stdlib", tmp_path / "kept")
    try:
        (project / file).unlink(missing_ok=True)
        if write is not None:
            write(project / file)
        before = tree(project)
        end, _ = entry("--recipe", "debug/nitp_debug", "--train-config", train_config)
        assert tree(project) == before
    finally:
        remove(project / file)
        shutil.rmtree(project / "assets/stdlib")
        shutil.copytree(tmp_path / "kept", project / "assets/stdlib")
    place = "recipes/debug/ntp_debug.toml" if "tokenizer" in file else "machine.toml"
    assert is_one_line(end) and message in end and end.startswith(f"error: {place}: "), end


@pytest.mark.parametrize(
    ("dump_folder", "log", "message"),
    [
        ("/proc/run", True, "cannot be written: /proc: "),
        ("/proc/run", False, "cannot be written: /proc: "),
        ("recipes/README.md/run", True, "recipes/README.md: Not a directory"),
        ("recipes/README.md", False, "recipes/README.md: Not a directory"),
        ("long/" + "x" * 300, True, "File name too long"),
    ],
)
def test_a_run_folder_that_cannot_be_made_is_one_line(project, entry, machine, monkeypatch, dump_folder, log, message):
    from torchtitan.observability.structured_logger import structured_logging

    monkeypatch.setattr(structured_logging, "_is_initialized", False)
    (project / "recipes/README.md").touch()
    train_config = machine(dump_folder=dump_folder, debug={"enable_structured_logging": log})
    before = tree(project)
    end, _ = entry("--recipe", "debug/nitp_debug", "--train-config", train_config)
    assert is_one_line(end) and message in end and end.startswith("error: machine.toml: dump_folder = '"), end
    assert tree(project) == before


def test_a_disk_too_small_for_one_checkpoint_is_refused_with_both_figures(entry, machine, monkeypatch):
    # 1,192,800 parameters of the model and 110,592 of the projector; with Adam three numbers of 4 bytes each.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    end, _ = entry("--recipe", "debug/nitp_debug", "--train-config", machine())
    assert end == (
        "error: machine.toml: dump_folder = 'outputs/debug/nitp_debug': one checkpoint needs 0.016 GB and the disk has "
        "0.010 GB free; choose another dump_folder, or [checkpoint] enable = false."
    )
    without = machine(checkpoint={"enable": False})
    assert entry("--recipe", "debug/nitp_debug", "--train-config", without)[0] == "accepted"
