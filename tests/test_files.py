"""Files as they are written and as they are told apart."""

import os
import shutil

import pytest

from nitp_titan.files import fingerprint

LARGE = 9 << 20


@pytest.fixture(params=[0, 1, 1000, LARGE], ids=["empty", "one byte", "small", "large"])
def file(request, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_bytes(os.urandom(request.param))
    return path


def test_a_file_is_known_by_its_content_and_not_by_path_or_time(file, tmp_path):
    before = fingerprint(file)
    assert before.partition(":")[0] == str(file.stat().st_size)
    moved = shutil.copy(file, tmp_path / "elsewhere")
    os.utime(moved, (1, 1))
    assert fingerprint(moved) == fingerprint(str(file)) == before


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_another_byte_at_either_end_is_another_file_of_the_same_size(tmp_path, at):
    for size in (2000, LARGE):
        path = tmp_path / f"{size}"
        content = bytearray(os.urandom(size))
        path.write_bytes(content)
        before = fingerprint(path)
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        content[at] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=times)
        assert fingerprint(path) != before


def test_a_small_file_is_hashed_whole(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(4 << 20))
    before = fingerprint(path)
    path.write_bytes(bytes(2 << 20) + b"1" + bytes((2 << 20) - 1))
    assert fingerprint(path) != before


def test_a_file_that_grew_at_its_end_is_known_by_its_old_size(file):
    before, size = fingerprint(file), file.stat().st_size
    with file.open("ab") as stream:
        stream.write(b"more")
    assert fingerprint(file) != before == fingerprint(file, size)
    content = b"x" + file.read_bytes()
    file.write_bytes(content)
    assert size == 0 or fingerprint(file, size) != before
