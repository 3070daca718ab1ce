"""The one reader of local text. CI runs this file with the oldest and the newest version of `datasets` (.ci/run)."""

import datetime
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from nitp_titan.data import text_sets
from nitp_titan.data.mixtures import TextSource
from nitp_titan.data.sources import (
    check_source,
    ConfiguredSource,
    described,
    left_out,
    local_files,
    open_source,
)
from nitp_titan.data.text_files import documents_of, find_files, kind_of
from nitp_titan.data.text_sets import TextStream
from nitp_titan.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def _lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(path, table, **options):
    pyarrow.parquet.write_table(table, path, **options)
    return path.read_bytes()


def _table(texts, kind=None, **others):
    return pyarrow.table({"text": pyarrow.array(texts, kind), **others})


TINY = [{"text": f"{number}"} for number in range(20_000)]
BOM = b"\xef\xbb\xbf"

# Name: file, content, texts.
GOOD = {
    "plain": ("x.jsonl", _lines({"text": "a"}, {"text": ""}, {"text": " "}), ["a", "", " "]),
    "a byte-order mark": ("x.jsonl", BOM + _lines({"text": "a"}, {"text": "b"}), ["a", "b"]),
    "a mark where files were joined": ("x.jsonl", (BOM + _lines({"text": "a"})) * 2, ["a", "a"]),
    "blank lines": ("x.jsonl", b"\n \t\n" + _lines({"text": "a"}) + b"\r\n\n" + _lines({"text": "b"}), ["a", "b"]),
    "CRLF": ("x.jsonl", b'{"text": "a"}\r\n{"text": "b\\r\\n"}\r\n', ["a", "b\r\n"]),
    "no end of the last line": ("x.jsonl", b'{"text": "a"}\n {"text": "b"} ', ["a", "b"]),
    "gzip": ("x.jsonl.gz", gzip.compress(_lines({"text": "a"})), ["a"]),
    "gzip without the suffix": ("x.jsonl", gzip.compress(BOM + _lines({"text": "a"})), ["a"]),
    "the suffix without gzip": ("x.jsonl.gz", _lines({"text": "a"}), ["a"]),
    "gzip with several members": (
        "x.jsonl.gz",
        gzip.compress(b'{"text": ') + gzip.compress(b'"a"}\n') + gzip.compress(_lines({"text": "b"})),
        ["a", "b"],
    ),
    "NUL and line separators": (
        "x.jsonl",
        '{"text": "a\\u0000b\u2028c\u0085d\\u2029"}\n'.encode(),
        ["a\0b\u2028c\u0085d\u2029"],
    ),
    "a pair of surrogates": ("x.jsonl", b'{"text": "\\ud83d\\ude42"}\n', ["🙂"]),
    "5 MB in a document": ("x.jsonl", _lines({"text": "ab c" * 1_250_000}, {"text": "b"}), ["ab c" * 1_250_000, "b"]),
    "20,000 tiny ones": ("x.jsonl", _lines(*TINY), [row["text"] for row in TINY]),
    "fields that some lines lack": ("x.jsonl", _lines({"text": "a", "url": "u"}, {"text": "b"}), ["a", "b"]),
    "fields of changing type": ("x.jsonl", _lines({"text": "a", "n": 1}, {"n": ["x"], "text": "b"}), ["a", "b"]),
    "what looks like a date": ("x.jsonl", _lines({"text": "2024-01-01", "date": "2024-01-01"}), ["2024-01-01"]),
    "the ending json": ("x.json", _lines({"text": "a"}, {"text": "b"}), ["a", "b"]),
    "plain text": ("x.txt", BOM + "\n\none\nmore\n\n  \ntwö\r\n".encode(), ["one\nmore\n", "twö\n"]),
    "plain text in gzip": ("x.txt.gz", gzip.compress(b"one\n\ntwo"), ["one\n", "two"]),
}
PARQUET = {
    "parquet": (_table(["a", "", "b"], n=pyarrow.array([1, 2, 3])), {"row_group_size": 2}),
    "large strings": (_table(["a", "", "b"], pyarrow.large_string()), {}),
    "a dictionary": (pyarrow.table({"text": pyarrow.array(["a", "", "b"]).dictionary_encode()}), {}),
}

# Name: file, content, what is said of it.
BAD = {
    "two objects on a line": (
        "x.jsonl",
        b'{"text": "a"}\n{"text": "a"} {"text": "b"}\n',
        "x.jsonl, line 2: more than one JSON value; the second begins at character 14.",
    ),
    "null": ("x.jsonl", _lines({"text": "a"}, {"text": None}), "x.jsonl, line 2: 'text' is null and not a text."),
    "a number": ("x.jsonl", _lines({"text": 7}), "x.jsonl, line 1: 'text' is 7 and not a text."),
    "a list": ("x.jsonl", _lines({"text": ["a", "b"]}), "x.jsonl, line 1: 'text' is a list ['a', 'b'] and not a text."),
    "half of a surrogate pair": (
        "x.jsonl",
        b'\n{"text": "one"}\n{"text": "x \\ud83d y"}\n',
        r"x.jsonl, line 3: 'text' has '\ud83d' at character 3, half of a surrogate pair.",
    ),
    "no UTF-8": (
        "x.jsonl",
        b'{"text": "a"}\n{"text": "\xe9"}\n',
        "x.jsonl, line 2: byte 0xe9 at 11, which is not UTF-8.",
    ),
    "another field": (
        "x.jsonl",
        _lines({"text": "a"}, {"txt": "a"}),
        "x.jsonl, line 2: there is no field 'text'. Did you mean 'txt'?",
    ),
    "no field": ("x.jsonl", b"{}\n", "x.jsonl, line 1: there is no field 'text'."),
    "no object": ("x.jsonl", b'"text"\n', "x.jsonl, line 1: 'text' and not an object with the field 'text'."),
    "no JSON": ("x.jsonl", b"plain words\n", "x.jsonl, line 1: no JSON object but 'plain words' (Expecting value: "),
    "a list of objects": (
        "x.json",
        b'[{"text": "a"},\n {"text": "b"}]\n',
        "x.json, line 1: a list begins, and not an object with the field 'text'; `jq -c '.[]' x.json > x.jsonl` writes",
    ),
    "a list on one line": ("x.json", b'[{"text": "a"}]', "`jq -c '.[]' x.json > x.jsonl` writes one object per line."),
    "an object over lines": (
        "x.json",
        b'{\n  "text": "a"\n}\n',
        "x.json, line 1: the object does not end in its line; `jq -c '.' x.json > x.jsonl` writes one object per line.",
    ),
    "too deep": ("x.jsonl", b"[" * 100_000 + b"\n", "x.jsonl, line 1: lists or objects that are nested too deeply."),
    "UTF-16": ("x.jsonl", '{"text": "a"}\n'.encode("utf-16"), "x.jsonl is UTF-16; `iconv -f UTF-16 -t UTF-8`"),
    "zstd": ("x.jsonl", b"\x28\xb5\x2f\xfd1234", "x.jsonl is compressed with zstd, which is not read; unpack it"),
    "gzip cut short": (
        "x.jsonl",
        gzip.compress(_lines(*TINY[:3]), mtime=0)[:-9],
        "x.jsonl, line 1 or later: the compressed data end too early: the file was cut short.",
    ),
    "damaged gzip": (
        "x.jsonl",
        gzip.compress(_lines({"text": "a"}))[:-8] + b"x" * 8,
        "x.jsonl, line 1 or later: damaged gzip: CRC check failed",
    ),
    "text that is not UTF-8": (
        "x.txt",
        b"one\n\ntwo\nthree \xff\n",
        "x.txt, line 4: byte 0xff at 7, which is not UTF-8.",
    ),
}


def _source(path, **options):
    return ConfiguredSource(TextSource(**{"dataset_path": str(path), **options}), "dataloader")


def _indexed(path, **options):
    return [row["text"] for row in open_source(_source(path, **options))]


def _streamed(path, **options):
    return [row["text"] for row in open_source(_source(path, streaming=True, **options))]


def _flagged(path, dataset="json"):
    return list(documents_of(Path(path), "text"))


def _checked_and_read(path, **options):
    check_source(_source(path, **options))
    return _indexed(path, **options)


READERS = [_indexed, _streamed, _flagged, _checked_and_read]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", GOOD)
def test_text_is_read_alike_by_everyone(tmp_path, name, read):
    file, content, texts = GOOD[name]
    (tmp_path / file).write_bytes(content)
    assert read(tmp_path / file) == texts


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", PARQUET)
def test_parquet_of_every_kind_of_string_is_read_alike(tmp_path, name, read):
    table, options = PARQUET[name]
    _parquet(tmp_path / "x", table, **options)
    assert kind_of(tmp_path / "x") == "parquet"
    assert read(tmp_path / "x", dataset="parquet") == ["a", "", "b"]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_named_alike_with_file_and_line(tmp_path, name, read):
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / file)
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
    setting = ("--text-field 'text'", "text_field = 'text'") if "no field" in message else ("--text", "dataset_path")
    begin = setting[0] if read is _flagged else f"[dataloader] {setting[1]}"
    assert str(error.value).startswith(f"{begin}: {tmp_path}/{file}"), str(error.value)


@pytest.mark.parametrize("read", [_indexed, _streamed, _flagged])
@pytest.mark.parametrize("line", [b"\n", b'{"text": "a", "m": [1]}\n', b'{"text": null}\n', b"{}{}\n", b'{"n": 1}\n'])
def test_the_answer_does_not_depend_on_where_the_line_stands(tmp_path, read, line):
    """`datasets` looks at the first 10 MB of the first file with other eyes."""
    filler = [_lines({"text": "x" * 100_000})] * 120
    answers = []
    for place in (0, 60, 120):
        (tmp_path / "x.jsonl").write_bytes(b"".join([*filler[:place], line, *filler[place:]]))
        try:
            answers.append(len(read(tmp_path / "x.jsonl")))
        except UserError as error:
            answers.append(str(error).replace(f"line {place + 1}:", "line N:"))
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("read", READERS)
def test_parquet_names_row_group_and_row(tmp_path, read):
    def said_of(table, **options):
        _parquet(tmp_path / "x", table, **options)
        with pytest.raises(UserError) as error:
            read(tmp_path / "x", dataset="parquet")
        return str(error.value).partition(f"{tmp_path}/")[2]

    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())
    with_null = _table(["a", "b", "c", None, "e"])
    assert said_of(with_null, row_group_size=2) == "x, row group 2, row 2: 'text' is null and not a text."
    assert said_of(_table([3])) == "x, row group 1, row 1: 'text' is 3 and not a text."
    assert said_of(_table([b"3"], pyarrow.binary())) == "x, row group 1, row 1: 'text' is b'3' and not a text."
    assert said_of(pyarrow.table({"text": bad})) == r"x, row group 1, row 1: 'text' is b'\xff' and not a text."
    assert said_of(pyarrow.table({"txt": ["a"]})) == "x has no column 'text'. Did you mean 'txt'?"
    day = pyarrow.array([datetime.date(2024, 1, 1)])
    assert "row group 1, row 1: 'text' is datetime.date(2024, 1, 1)" in said_of(_table(day))
    content = _parquet(tmp_path / "x", _table(["a" * 9] * 9), compression="none")
    (tmp_path / "x").write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    with pytest.raises(UserError, match="x cannot be read: |x is not a parquet file that can be read: "):
        read(tmp_path / "x", dataset="parquet")


def test_a_file_of_the_other_kind_is_named(tmp_path):
    _parquet(tmp_path / "x.parquet", _table(["a"]))
    (tmp_path / "x.jsonl").write_bytes(_lines({"text": "a"}))
    with pytest.raises(UserError, match="x.parquet is a parquet file; dataset = 'parquet' reads it."):
        check_source(_source(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match="x.jsonl is not a parquet file that can be read: "):
        check_source(_source(tmp_path / "x.jsonl", dataset="parquet"))


@pytest.mark.parametrize("read", [_indexed, _streamed, _checked_and_read])
def test_files_that_differ_in_other_columns_and_empty_ones_are_one_text(tmp_path, read):
    parts = [_lines({"text": "a", "id": 1}), b"", _lines({"meta": {"m": 1}, "text": "b"}), b"\n\n", gzip.compress(b"")]
    for index, part in enumerate(parts):
        (tmp_path / f"{index}.jsonl").write_bytes(part)
    assert read(tmp_path) == ["a", "b"]
    none = pyarrow.table({"n": pyarrow.array([], pyarrow.int8())})
    for index, table in enumerate((_table(["a"], id=pyarrow.array([1])), none, _table(["b"]))):
        _parquet(tmp_path / f"{index}.parquet", table)
    assert read(tmp_path, dataset="parquet") == ["a", "b"]


def test_a_text_without_documents_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\n")
    _parquet(tmp_path / "x.parquet", _table([], pyarrow.string()))
    for dataset in ("json", "parquet"):
        with pytest.raises(UserError, match=r"^\[dataloader\] dataset_path = '.*' holds no document.$"):
            check_source(_source(tmp_path, dataset=dataset))


def test_several_fields_are_joined_by_an_empty_line(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(_lines({"q": "1 + 1?", "n": 0, "a": "2"}, {"q": "?", "a": None}))
    stream = open_source(_source(tmp_path, text_field=["q", "a"], streaming=True))
    rows = iter(stream)
    assert next(rows) == {"text": "1 + 1?\n\n2"}
    with pytest.raises(UserError, match="x.jsonl, line 2: 'a' is null and not a text."):
        next(rows)


# Files and patterns


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(_lines({"text": name}))


def test_a_name_is_a_name_and_a_pattern_is_expanded_once(tmp_path, monkeypatch):
    names = ["part [1].jsonl", "part0.jsonl", "part[0].jsonl", "$HOME.jsonl", "x::y.jsonl"]
    names += ["what?.jsonl", "~.jsonl", "a*.jsonl"]
    _touch(tmp_path, *names, "run[v2]/x.jsonl", "run2/x.jsonl", "ab.jsonl")
    monkeypatch.chdir(tmp_path)
    for name in (*names, "run[v2]/x.jsonl"):
        assert _indexed(name) == _streamed(name) == [name]
    assert _indexed("run[v2]") == _indexed("run[v2]/*") == _indexed("run[[]v2]/*.jsonl") == ["run[v2]/x.jsonl"]
    assert _indexed("part[0-9].jsonl") == ["part0.jsonl"]
    assert sorted(_indexed(".")) == sorted([*names, "ab.jsonl"])
    assert _indexed("run*/x.jsonl") == ["run2/x.jsonl", "run[v2]/x.jsonl"]
    with pytest.raises(UserError, match=r"dataset_path = 'x\[1\].jsonl' names no file"):
        check_source(_source("x[1].jsonl"))


def test_two_stars_reach_any_depth(tmp_path):
    _touch(tmp_path, "a.jsonl", "b/c.jsonl", "b/d/e.jsonl")
    assert _indexed(tmp_path / "**/*.jsonl") == ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl"]


def test_a_folder_gives_its_text_and_says_what_it_leaves_out(tmp_path):
    _touch(tmp_path, "a.JSONL", "b.ndjson", "c.jsonl.gz", "d.json.gz", "e.jsonl.zst", ".hidden.jsonl", "_SUCCESS")
    _touch(tmp_path, "in/x.jsonl")
    (tmp_path / "f.jsonl").symlink_to(tmp_path / "gone")
    entry = _source(tmp_path)
    assert _indexed(tmp_path) == ["a.JSONL", "b.ndjson", "c.jsonl.gz", "d.json.gz"]
    assert left_out(entry) == (
        f"'{tmp_path}': not read: {tmp_path}/e.jsonl.zst, {tmp_path}/f.jsonl (of another ending, or a dead link)"
    )
    assert left_out(_source(tmp_path / "?.jsonl")) == (
        f"'{tmp_path}/?.jsonl': not read: {tmp_path}/f.jsonl (of another ending, or a dead link)"
    )
    assert left_out(_source(tmp_path / "a.JSONL")) is None
    assert find_files(str(tmp_path / "f.jsonl"), "json").files == []


def test_a_folder_of_json_says_how_to_name_its_files(tmp_path):
    _touch(tmp_path, "a.json", "b.json")
    with pytest.raises(UserError, match=r"names no file. Its .json files are left out, .*: '.*/\*.json' names them."):
        check_source(_source(tmp_path))
    assert _checked_and_read(tmp_path / "*.json") == ["a.json", "b.json"]
    for file in tmp_path.iterdir():
        file.rename(file.with_suffix(".zst"))
    with pytest.raises(UserError, match="names no file. Of a folder .jsonl, .ndjson, .* are read, and not a.zst."):
        check_source(_source(tmp_path))


def test_what_is_read_is_said_with_files_documents_and_bytes(tmp_path):
    _touch(tmp_path, "a.jsonl", "b.jsonl")
    for streaming, expected in ((None, "2 files, 2 documents"), (True, "2 files, 40 bytes, streamed")):
        entry = _source(tmp_path, streaming=streaming)
        assert described(entry, open_source(entry)) == f"'{tmp_path}': {expected}"
    entry = _source(tmp_path / "a.jsonl")
    assert described(entry, open_source(entry)).endswith(": 1 file, 1 document")


# Streams


def _formats(folder, texts):
    """The same documents in every format: paths by name."""
    middle = len(texts) // 2
    for part, some in enumerate((texts[:middle], [], texts[middle:])):
        lines = b"\n" + b"".join(_lines({"text": text}) + b"\r\n" for text in some)
        for name, content in (("lines", lines), ("gzip", gzip.compress(BOM + lines))):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{part}.jsonl").write_bytes(content)
        for name in ("plain", "rows"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "plain" / f"{part}.txt").write_text("\n\n\n".join(some))
        _parquet(folder / "rows" / f"{part}.parquet", _table(some, pyarrow.string()), row_group_size=3)
    return {name: folder / name for name in ("lines", "gzip", "plain", "rows")}


def _stream(folder):
    files = sorted(map(str, Path(folder).iterdir()))
    kind = "parquet" if files[0].endswith("parquet") else "json"
    return TextStream(files, ["text"], kind, error=lambda error: error)


def _texts(stream):
    return [row["text"] for row in stream]


@pytest.mark.parametrize("name", ["lines", "gzip", "plain", "rows"])
def test_a_stream_resumes_after_any_document_in_any_format(tmp_path, name):
    texts = [f"document {number}\nits second line" + "ü" * number for number in range(14)]
    stream = _stream(_formats(tmp_path, texts)[name])
    if name == "plain":
        # The last lines of the two files have no end.
        texts = [text + "\n" * (index not in (6, 13)) for index, text in enumerate(texts)]
    reading, rows = stream.shard(1, 0), 0
    for rows, row in enumerate(reading, start=1):
        assert row == {"text": texts[rows - 1]}
        resumed = stream.shard(1, 0)
        resumed.load_state_dict(json.loads(json.dumps(reading.state_dict())))
        assert _texts(resumed) == texts[rows:]
    assert rows == len(texts)
    reading.set_epoch(1)
    assert _texts(reading) == texts


def test_a_stream_of_files_is_cut_as_datasets_cuts_its_own(tmp_path):
    _touch(tmp_path / "text", *(f"{index}.jsonl" for index in range(7)))
    files = local_files(str(tmp_path / "text"))
    theirs = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    for count in (1, 2, 3, 7):
        for index in range(count):
            for contiguous in (True, False):
                expected = _texts(theirs.shard(count, index, contiguous=contiguous))
                assert _texts(_stream(tmp_path / "text").shard(count, index, contiguous=contiguous)) == expected


# The index


def test_an_index_is_known_by_content_and_not_by_name_or_time(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_bytes(_lines({"text": "old"}, {"text": "same"}))
    assert _indexed(path) == ["old", "same"]
    times = path.stat()
    path.write_bytes(_lines({"text": "new"}, {"text": "same"}))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and path.stat().st_mtime_ns == times.st_mtime_ns
    assert _indexed(path) == ["new", "same"]
    moved = path.rename(tmp_path / "moved.jsonl")

    def read(*arguments, **options):
        raise AssertionError("read again")

    monkeypatch.setattr(text_sets, "read_file", read)
    assert _indexed(moved) == ["new", "same"]
    for options in ({"text_field": ["text", "text"]}, {"dataset": "parquet"}):
        with pytest.raises(AssertionError, match="read again"):
            _indexed(moved, **options)


def test_a_large_file_that_changed_in_its_middle_is_read_again(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"text": "x" * 1_000_000}] * 12
    path.write_bytes(_lines(*rows))
    assert len(_indexed(path)) == 12
    times = path.stat()
    path.write_bytes(_lines(*rows[:5], {"text": "y" * 1_000_000}, *rows[6:]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert _indexed(path)[5][0] == "y"


def test_a_bad_file_is_read_as_far_as_its_bad_line_once(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_bytes(_lines({"text": "a"}, {"txt": "b"}))
    with pytest.raises(UserError) as first:
        _indexed(path)
    copy = Path(shutil.copy(path, tmp_path / "copy.jsonl"))
    monkeypatch.setattr(text_sets, "read_file", None)
    with pytest.raises(UserError) as second:
        _indexed(copy)
    assert str(second.value) == str(first.value).replace("x.jsonl", "copy.jsonl")
    assert not list(tmp_path.glob("cache/**/*.tmp")) and not list(tmp_path.glob("cache/**/*.arrow"))


def test_an_index_is_mapped_and_travels_by_name(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(_lines(*({"text": "x" * 10_000, "n": number} for number in range(300))))
    documents = open_source(_source(path))
    assert documents.column_names == ["text"] and len(pickle.dumps(documents)) < 20_000
    again = pickle.loads(pickle.dumps(documents))
    assert again[299] == {"text": "x" * 10_000}
    assert documents.shuffle(seed=3)["text"] == again.shuffle(seed=3)["text"]


def test_a_cache_that_cannot_be_written_is_named_and_not_the_text(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(_lines({"text": "a"}))
    cache = tmp_path / "x.jsonl/cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    with pytest.raises(UserError, match=f"^the cache {cache}.* cannot be used: a part of this path is not a folder"):
        _indexed(tmp_path / "x.jsonl")


def test_a_full_disk_leaves_no_half_an_index(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(_lines({"text": "a"}))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        _indexed(tmp_path / "x.jsonl")
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert _indexed(tmp_path / "x.jsonl") == ["a"]


READ_AT_ONCE = """
import sys, time, datasets
from nitp_titan.data import text_sets
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
write, wrote = text_sets._write, []
def slowly(*arguments):
    wrote.append(1)
    time.sleep(1.0)
    write(*arguments)
text_sets._write = slowly
print(len(text_sets.indexed([sys.argv[1]], ["text"], "json")), len(wrote))
"""


def test_processes_that_start_together_read_the_text_once(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(_lines(*TINY[:9]))
    command = [sys.executable, "-c", READ_AT_ONCE, str(tmp_path / "x.jsonl"), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate()[0].split() for process in processes]
    assert [answer[0] for answer in answers] == ["9"] * 3
    assert sum(int(answer[1]) for answer in answers) == 1
