"""The one reader of local text, for training, tokenizing, evaluation and geometry: JSON lines, plain text and parquet.

JSON lines (an object per line) and plain text (documents between blank lines, in files named ``*.txt``) are UTF-8
and may be gzipped, whatever the file is called. A byte-order mark, blank lines and CRLF are no content. Of JSON and
parquet only the fields of the text are looked at. Imports neither torch nor `datasets`.
"""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from nitp_titan.errors import first_line, nearest_choice, short_repr, UserError

# Files of a folder. Plain *.json is left out: a folder of text often holds a manifest of that name.
_ENDINGS = {"json": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz"), "parquet": (".parquet",)}
# Bytes; a line without end must not fill the memory.
_LONGEST_LINE = 1 << 30
_BUFFER = 1 << 20
_ROWS = 256

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = {
    b"PAR1": "a parquet file; dataset = 'parquet' reads it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd, which is not read; unpack it or compress it with gzip",
    b"BZh": "compressed with bzip2, which is not read; unpack it or compress it with gzip",
    b"\xfd7zXZ": "compressed with xz, which is not read; unpack it or compress it with gzip",
    b"PK\x03\x04": "a zip archive, which is not read; unpack it",
    b"\xff\xfe": "UTF-16; `iconv -f UTF-16 -t UTF-8` converts it",
    b"\xfe\xff": "UTF-16; `iconv -f UTF-16 -t UTF-8` converts it",
}


class TextError(ValueError):
    """A mistake in a text file: ``file, line N: finding``.

    Args:
        file: as it was named.
        where: line or row; None for the file as a whole.
        found: the end of the sentence.
        is_field: whether the setting of the field is to blame and not the file.
    """

    def __init__(self, file: str, where: str | None, found: str, is_field: bool = False):
        message = f"{file}, {where}: {found}" if where else f"{file} {found}"
        super().__init__(message if message.endswith((".", "?")) else f"{message}.")
        self.parts = (file, where, found, is_field)
        self.is_field = is_field

    def __reduce__(self):
        return type(self), self.parts


@dataclass(frozen=True)
class Found:
    """Files that a path, a folder or a pattern names, sorted, and those beside them that are not read."""

    files: list[str]
    left_out: list[str]


def find_files(path: str, kind: str) -> Found:
    """Files that a path names: a file, a folder, or else a pattern (``*``, ``?``, ``[...]``, ``**`` for any depth).

    Args:
        path: what exists by this name is meant by it, brackets and all.
        kind: ``json`` or ``parquet``: which files of a folder are text.
    """
    place = Path(path)
    if place.is_dir():
        names = [str(file) for file in place.iterdir() if not file.name.startswith((".", "_"))]
        chosen = {name for name in names if name.lower().endswith(_ENDINGS.get(kind, ())) and Path(name).is_file()}
    else:
        names = [path] if place.exists() else glob.glob(_pattern(place), recursive=True)
        chosen = {name for name in names if Path(name).is_file()}
    return Found(sorted(chosen), sorted(name for name in {*names} - chosen if not Path(name).is_dir()))


def _pattern(path: Path) -> str:
    """A path as a pattern, but for the folders at its beginning that exist by their names."""
    there = next((folder for folder in path.parents if folder.parts and folder.exists()), Path())
    return os.path.join(glob.escape(str(there)) if there.parts else "", path.relative_to(there))


def how_to_name(path: str, kind: str) -> str:
    """For a path that names no file to read: how its files are named, or an empty text."""
    left_out = find_files(path, kind).left_out
    if kind == "json" and any(name.lower().endswith(".json") for name in left_out):
        pattern = Path(path) / "*.json"
        return f" Its .json files are left out, as a folder often has others too: '{pattern}' names them."
    if left_out:
        what = "a folder" if Path(path).is_dir() else "it"
        return f" Of {what} {', '.join(_ENDINGS[kind])} are read, and not {Path(left_out[0]).name}."
    return ""


class Document(NamedTuple):
    """A text and the place of the one after it in its file: lines or rows passed, and bytes or rows."""

    text: str
    place: tuple[int, int]


def kind_of(file: Path) -> str:
    """``parquet`` for a file that begins as one, else ``json``."""
    try:
        with file.open("rb") as stream:
            return "parquet" if stream.read(4) == b"PAR1" else "json"
    except OSError:
        return "json"


def read_file(
    file: str, fields: Sequence[str], *, kind: str = "json", start: Sequence[int] = (0, 0)
) -> Iterator[Document]:
    """Documents of a file, one at a time; those of several fields are joined by an empty line.

    Args:
        file: its name; no pattern.
        fields: of an object or row, that hold the text.
        kind: ``json``, which ``.txt`` belongs to, or ``parquet``.
        start: from `Document.place`, to resume from.

    Raises:
        TextError: naming the file, the line or row, and what was found.
    """
    number, position = start
    try:
        if kind == "parquet":
            yield from _Rows(file, fields).documents(number)
        elif is_plain(file):
            yield from _Paragraphs(file).documents(number, position)
        else:
            yield from _Lines(file, fields).documents(number, position)
    except OSError as error:
        raise TextError(file, None, f"cannot be read: {error.strerror or first_line(error)}") from None


def documents_of(path: Path, field: str) -> Iterator[str]:
    """Documents of the file that the flags ``--text`` and ``--text-field`` name.

    Raises:
        UserError: naming the flag, the file, the line and what was found.
    """
    if not path.is_file():
        siblings = [str(one) for one in path.parent.glob("*") if one.suffix in (".jsonl", ".txt", ".parquet")]
        raise UserError(f"--text {path} is not a file.{nearest_choice(str(path), siblings)}")
    try:
        for document in read_file(str(path), [field], kind=kind_of(path)):
            yield document.text
    except TextError as error:
        raise UserError(f"--text-field '{field}': {error}" if error.is_field else f"--text: {error}") from None


def is_plain(file: str) -> bool:
    return file.lower().removesuffix(".gz").endswith(".txt")


def _opened(file: str) -> BinaryIO:
    stream = open(file, "rb", buffering=_BUFFER)  # noqa: SIM115 (its caller closes it)
    head = stream.read(6)
    stream.seek(0)
    if head.startswith(_GZIP):
        return io.BufferedReader(_Gzip(stream), _BUFFER)
    for magic, found in _OTHER_FORMATS.items():
        if head.startswith(magic):
            stream.close()
            raise TextError(file, None, f"is {found}")
    return stream


class _Gzip(gzip.GzipFile):
    """Closes the file that it reads, too."""

    def __init__(self, stream):
        super().__init__(fileobj=stream, mode="rb")
        self._stream = stream

    def close(self) -> None:
        super().close()
        self._stream.close()


class _Lines:
    """JSON lines."""

    def __init__(self, file: str, fields: Sequence[str]):
        self._file, self._fields = file, fields
        self._decoder = json.JSONDecoder()

    def documents(self, number: int, offset: int) -> Iterator[Document]:
        """Documents after a place, as `lines`."""
        for line, found, place in self.lines(number, offset):
            yield Document(self._text(line, found), place)

    def lines(self, number: int, offset: int) -> Iterator[tuple[bytes, int, tuple[int, int]]]:
        """Lines that are not blank, each with its number, from 1, and where the next one is.

        Args:
            number: lines passed before.
            offset: of the first byte to read, in the file when it is unpacked.
        """
        try:
            with _opened(self._file) as stream:
                if offset:
                    stream.seek(offset)
                for line in iter(partial(stream.readline, _LONGEST_LINE), b""):
                    number += 1
                    offset += len(line)
                    if len(line) == _LONGEST_LINE:
                        raise self._error(number, f"a line of more than {_LONGEST_LINE >> 20:,} MiB")
                    # Files that were joined have one within.
                    line = line.removeprefix(_BOM)
                    if line and not line.isspace():
                        yield line, number, (number, offset)
        except EOFError:
            raise self._damaged(number, "the compressed data end too early: the file was cut short") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise self._damaged(number, f"damaged gzip: {error}") from None

    def _damaged(self, number: int, found: str) -> TextError:
        # What was unpacked together with the damage is lost.
        return TextError(self._file, f"line {number + 1} or later", found)

    def _text(self, line: bytes, number: int) -> str:
        decoded = self.decoded(line, number)
        try:
            document, end = self._decoder.raw_decode(decoded, len(decoded) - len(decoded.lstrip(" \t\r\n")))
        except (ValueError, RecursionError) as error:
            raise self._no_json(number, decoded, error) from None
        if not isinstance(document, dict):
            how = f"; {self._conversion('.[]')}" if isinstance(document, list) else ""
            raise self._error(number, f"{_short(document)} and not an object with the field '{self._fields[0]}'{how}")
        if decoded[end:].strip(" \t\r\n"):
            raise self._error(number, f"more than one JSON value; the second begins at character {end + 1}")
        return joined(document, self._fields, partial(self._error, number))

    def decoded(self, line: bytes, number: int) -> str:
        """A line as text; TextError where it is not UTF-8."""
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
            raise self._error(number, f"{byte}, which is not UTF-8") from None

    def _no_json(self, number: int, line: str, error: Exception) -> TextError:
        text = line.strip()
        if isinstance(error, RecursionError):
            return self._error(number, "lists or objects that are nested too deeply")
        if number == 1 and text[0] == "[":
            expected = f"not an object with the field '{self._fields[0]}'"
            return self._error(number, f"a list begins, and {expected}; {self._conversion('.[]')}")
        if text[0] == "{" and getattr(error, "pos", 0) >= len(line.rstrip()):
            return self._error(number, f"the object does not end in its line; {self._conversion('.')}")
        how = "" if text[0] == "{" else "; plain text needs the ending .txt"
        return self._error(number, f"no JSON object but {short_repr(text[:60])} ({first_line(error)}){how}")

    def _conversion(self, what: str) -> str:
        name = Path(self._file).name
        return f"`jq -c '{what}' {name} > {Path(name).stem}.jsonl` writes one object per line"

    def _error(self, number: int, found: str, is_field: bool = False) -> TextError:
        return TextError(self._file, f"line {number}", found, is_field)


class _Paragraphs:
    """Plain text: lines between blank ones are a document."""

    def __init__(self, file: str):
        self._lines = _Lines(file, ())

    def documents(self, number: int, offset: int) -> Iterator[Document]:
        """Documents after a place, as `_Lines.lines`."""
        lines: list[str] = []
        last = number, offset
        for line, found, after in self._lines.lines(number, offset):
            if lines and found != last[0] + 1:
                yield _document(lines, last)
                lines = []
            lines.append(self._lines.decoded(line, found))
            last = after
        if lines:
            yield _document(lines, last)


def _document(lines: list[str], place: tuple[int, int]) -> Document:
    return Document("".join(lines).replace("\r\n", "\n"), place)


class _Rows:
    """Rows of parquet."""

    def __init__(self, file: str, fields: Sequence[str]):
        self._file, self._fields = file, list(fields)

    def documents(self, number: int) -> Iterator[Document]:
        """Documents after a number of rows; both numbers of their places are of rows."""
        try:
            with pyarrow.parquet.ParquetFile(self._file) as parquet:
                yield from self._read(parquet, number)
        except pyarrow.ArrowException as error:
            raise TextError(self._file, None, f"is not a parquet file that can be read: {first_line(error)}") from None

    def _read(self, parquet: pyarrow.parquet.ParquetFile, done: int) -> Iterator[Document]:
        groups = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        self._ends = list(accumulate(groups))
        names = parquet.schema_arrow.names
        for field in self._fields:
            if field not in names and sum(groups):
                raise TextError(self._file, None, f"has no column '{field}'.{nearest_choice(field, names)}", True)
        number = 0
        for group, size in enumerate(groups):
            if number + size <= done:
                number += size
                continue
            for batch in parquet.iter_batches(_ROWS, row_groups=[group], columns=self._fields):
                if number + len(batch) <= done:
                    number += len(batch)
                    continue
                for row in zip(*(_values(batch.column(field)) for field in self._fields)):
                    number += 1
                    if number > done:
                        yield Document(self._text(row, number), (number, number))

    def _text(self, row: tuple, number: int) -> str:
        def error(found: str, is_field: bool = False) -> TextError:
            group = next(index for index, end in enumerate(self._ends) if number <= end)
            within = number - (self._ends[group - 1] if group else 0)
            return TextError(self._file, f"row group {group + 1}, row {within}", found, is_field)

        return joined(dict(zip(self._fields, row)), self._fields, error)


def _values(column: pyarrow.Array) -> list:
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(value) for value in column]


def _value(value: pyarrow.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes()


def joined(document: dict[str, Any], fields: Sequence[str], error: Callable[..., Exception]) -> str:
    """The texts of the fields of a document.

    Args:
        error: makes the error from what was found, and whether the field's name is to blame.
    """
    for field in fields:
        text = document.get(field)
        if not isinstance(text, str):
            if field not in document:
                raise error(f"there is no field '{field}'.{nearest_choice(field, list(document))}", True)
            raise error(f"'{field}' is {_short(text)} and not a text")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as reason:
                half = ascii(text[reason.start])
                raise error(f"'{field}' has {half} at character {reason.start + 1}, half of a surrogate pair") from None
    return "\n\n".join([document[field] for field in fields])


def _short(value: Any) -> str:
    """A value as JSON writes it, cut where it is long."""
    if isinstance(value, (list, dict)):
        return ("a list " if isinstance(value, list) else "an object ") + short_repr(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else short_repr(value)
