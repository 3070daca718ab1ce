"""A benchmark from any text, in the harness' own format: it needs no network and runs on any machine.

Two tasks: perplexity of whole documents, and the choice of a passage's true continuation among those of passages of
other documents.
"""

import glob
import json
import random
import shutil
from pathlib import Path

from nitp_titan.data.text_files import documents_of
from nitp_titan.errors import UserError
from nitp_titan.files import draft_of, read_own, sha256

DEFAULT_TEXT = Path("assets/stdlib/validation.jsonl")
DEFAULT_FOLDER = Path("assets/local_suite")

# Of longer ones the text has no spaces between words, and a perplexity by word no number can hold.
_LONGEST_MEAN_WORD = 40

# Raised when the same text would give other tasks.
_FORMAT = 1
_SEED = 0
_CONTEXT_CHARS, _CONTINUATION_CHARS = 400, 100
_CHOICES = 4
# Long documents would be most of the test.
_PASSAGES_PER_DOCUMENT = 30

_TASK = """\
task: local_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
{body}
metadata:
  version: {format}
"""
_PERPLEXITY = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity"""
_CONTINUATION = """\
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm"""


def prepare(text: Path, folder: Path, field: str = "text") -> dict:
    """Write the two tasks of a text into ``folder``, unless they are there. They appear together or not at all.

    Args:
        text: JSON lines, parquet, or a ``.txt`` with blank lines between documents.
        field: field of a line that holds its text.

    Returns:
        The manifest: hash of the text, documents and passages; ``"new"`` says whether anything was written.

    Raises:
        UserError: if the text cannot be read, or has too few documents of enough length.
    """
    # The harness has no perplexity of a blank document.
    documents = [document for document in documents_of(text, field) if document.strip()]
    digest = sha256(text)
    made_from = {"format": _FORMAT, "text": str(text), "field": field, "sha256": digest, "folder": _absolute(folder)}
    known = _manifest(folder)
    if known and {key: known.get(key) for key in made_from} == made_from:
        return {**known, "new": False}
    passages = continuations(documents)
    if not passages:
        raise UserError(
            f"--text {text}: the continuations need {_CHOICES} documents of more than "
            f"{_CONTEXT_CHARS + _CONTINUATION_CHARS} characters."
        )
    manifest = {**made_from, "documents": len(documents), "passages": len(passages)}
    try:
        _write(folder, documents, passages, manifest)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}.") from None
    return {**manifest, "new": True}


def ensure(folder: Path) -> str:
    """Make the suite in ``folder`` if it is missing or its text has changed; returns the identity of its data.

    Raises:
        UserError: naming the command that makes it, if there is nothing to make it from.
    """
    known = _manifest(folder)
    text, field = (Path(known["text"]), known["field"]) if known else (DEFAULT_TEXT, "text")
    if text.is_file():
        known = prepare(text, folder, field)
    elif not known or known["folder"] != _absolute(folder):
        raise UserError(
            f"there is no local suite in {folder}. Run `python scripts/prepare_assets.py` for the text of Python's "
            "library, or `python scripts/prepare_local_suite.py --text FILE.jsonl` for your own."
        )
    return f"{known['sha256']} format {known['format']}"


def continuations(documents: list[str]) -> list[dict]:
    """Passages as ``{"context", "choices", "answer"}``; the others' continuations are drawn from other documents.

    The same documents give the same passages in the same order. Empty if fewer documents than choices are long enough.
    """
    draw = random.Random(_SEED)
    by_document = [found for text in documents if (found := _passages(text, draw))]
    if len(by_document) < _CHOICES:
        return []
    made = []
    for index, passages in enumerate(by_document):
        others = [*by_document[:index], *by_document[index + 1 :]]
        for context, truth in passages:
            wrong = [draw.choice(other)[1] for other in draw.sample(others, _CHOICES - 1)]
            answer = draw.randrange(_CHOICES)
            made.append({"context": context, "choices": [*wrong[:answer], truth, *wrong[answer:]], "answer": answer})
    # A limited run takes the first ones, and should see many documents.
    draw.shuffle(made)
    return made


def _passages(text: str, draw: random.Random) -> list[tuple[str, str]]:
    """Pairs of neighbouring pieces of a document, cut before a space where there is one."""
    length = _CONTEXT_CHARS + _CONTINUATION_CHARS
    found = []
    for start in range(0, len(text) - length, length):
        middle = _cut(text, start + _CONTEXT_CHARS)
        context, truth = text[start:middle], text[middle : _cut(text, start + length)]
        if context.strip() and truth.strip():
            found.append((context, truth))
    return sorted(draw.sample(found, min(len(found), _PASSAGES_PER_DOCUMENT)), key=found.index)


def _cut(text: str, end: int) -> int:
    """The nearest place at or before ``end`` where a space begins; languages without spaces are cut anywhere."""
    for place in range(end, end - _CONTINUATION_CHARS // 2, -1):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    return end


def _manifest(folder: Path) -> dict | None:
    path = folder / "manifest.json"
    return read_own(path)


def _absolute(folder: Path) -> str:
    return str(folder.resolve())


def _write(folder: Path, documents: list[str], passages: list[dict], manifest: dict) -> None:
    with draft_of(folder) as draft:
        _write_lines(draft / "documents.jsonl", [{"text": text} for text in documents])
        _write_lines(draft / "passages.jsonl", passages)
        for name, data, body in (
            ("perplexity", "documents", _PERPLEXITY + _by_word(documents)),
            ("continuation", "passages", _CONTINUATION),
        ):
            # `datasets` takes it for a pattern, and YAML for more than a name.
            path = json.dumps(glob.escape(f"{_absolute(folder)}/{data}.jsonl"), ensure_ascii=False)
            task = _TASK.format(name=name, data=path, body=body, format=_FORMAT)
            (draft / f"local_{name}.yaml").write_text(task, encoding="utf-8")
        (draft / "manifest.json").write_text(json.dumps(manifest, indent=2))
        if folder.exists() and not _manifest(folder):
            raise UserError(f"--out {folder} holds something else; choose another folder.")
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)


def _by_word(documents: list[str]) -> str:
    num_bytes = sum(len(text.encode()) for text in documents)
    num_words = sum(len(text.split()) for text in documents)
    return "\n  - metric: word_perplexity" if num_bytes <= _LONGEST_MEAN_WORD * num_words else ""


def _write_lines(path: Path, records: list[dict]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
