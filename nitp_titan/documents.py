"""Documents of a text file, one at a time. Imports no torch."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from nitp_titan.config import nearest, UserError


def read_documents(path: Path, field: str) -> Iterator[str]:
    """Documents of a text file that are not blank, one at a time.

    Args:
        path: UTF-8. ``.txt``: paragraphs between blank lines. Any other: JSON lines.
        field: of the JSON objects.

    Raises:
        UserError: naming the file and the line.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            documents = _paragraphs(lines) if path.suffix == ".txt" else _json_texts(path, lines, field)
            yield from (document for document in documents if document.strip())
    except OSError as error:
        siblings = [str(one) for one in path.parent.glob("*") if one.suffix in (".jsonl", ".txt")]
        raise UserError(f"--text {path} cannot be read: {error.strerror}.{nearest(str(path), siblings)}") from None
    except UnicodeDecodeError:
        raise UserError(f"--text {path} is not UTF-8; a compressed file must be unpacked first.") from None


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    return ("".join(group) for _, group in groupby(lines, key=lambda line: bool(line.strip())))


def _json_texts(path: Path, lines: Iterable[str], field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            way_out = "plain text needs the ending .txt"
            raise UserError(f"{path}, line {number}: no JSON ({error.msg}); {way_out}.") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: an object with the field '{field}' must stand in every line.")
        if field not in row:
            raise UserError(f"{path}, line {number}: there is no --text-field '{field}'.{nearest(field, list(row))}")
        if not isinstance(row[field], str):
            raise UserError(f"{path}, line {number}: '{field}' is no text but {json.dumps(row[field])[:40]}.")
        yield row[field]
