"""The corpus and tokenizer that every machine can make: Python's standard library.

Real text without a download: documentation topics, the docstrings of compiled
modules and the source of all others, one document per module. The same Python
version gives the same bytes.
"""

import hashlib
import inspect
import json
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

BOS, EOS = "<|bos|>", "<|eos|>"
VOCAB_SIZE = 4096
VALIDATION_PERCENT = 5

# Raised when the text or the tokenizer would differ for the same Python.
_FORMAT = 3
_MIN_CHARS = 400
_MIN_PROSE = 0.75
_MAX_CODES = 0.25
_HEX_CODE = re.compile(r"0x[0-9A-Fa-f]{2}|\\[xuU][0-9A-Fa-f]{2}")
# Tests are no documentation, and pydoc_data holds the topics a second time.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data"}


def is_text(document: str) -> bool:
    """Whether a document is long enough to learn from and is not a table.

    Tables are mostly digits and punctuation (operator lists) or mostly lines with
    a hexadecimal code (code pages); prose and code are neither.
    """
    if len(document) < _MIN_CHARS:
        return False
    prose = sum(char.isalpha() or char.isspace() for char in document)
    lines = document.splitlines()
    codes = sum(_HEX_CODE.search(line) is not None for line in lines)
    return prose / len(document) >= _MIN_PROSE and codes / len(lines) <= _MAX_CODES


def _source_modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _NOT_LIBRARY.isdisjoint(parts) and not parts[-1].startswith("_sysconfigdata"):
            yield ".".join(parts), path.read_text(encoding="utf-8", errors="ignore")


def _compiled_modules() -> list[tuple[str, str]]:
    """Docstrings as a fresh interpreter has them: libraries and debuggers replace functions of ours."""
    command = [sys.executable, "-I", "-S", __file__]
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
    return [tuple(entry) for entry in json.loads(done.stdout)]


def _docstrings_of_compiled_modules() -> Iterator[tuple[str, str]]:
    for name in sorted(sys.builtin_module_names):
        module = import_module(name)
        texts = [inspect.getdoc(module) or ""]
        for key, value in sorted(vars(module).items()):
            if not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            texts.append(f"{key}\n{inspect.getdoc(value) or ''}")
            if inspect.isclass(value):
                texts += [
                    f"{key}.{attribute}\n{inspect.getdoc(member)}"
                    for attribute, member in sorted(vars(value).items())
                    if not attribute.startswith("_") and inspect.getdoc(member)
                ]
        yield name, "\n\n".join(texts)


def stdlib_documents() -> list[dict[str, str]]:
    """Documents of the running Python's standard library, in a fixed mixed order.

    Returns:
        ``[{"name": ..., "text": ...}]``, ordered by the hash of the name, so that
        neighbouring documents are unrelated; names are unique.
    """
    sources = {
        "topic": sorted(pydoc_data.topics.topics.items()),
        "docstrings": _compiled_modules(),
        "module": _source_modules(),
    }
    documents = [
        {"name": f"{kind}:{name}", "text": text}
        for kind, entries in sources.items()
        for name, text in entries
        if is_text(text)
    ]
    return sorted(documents, key=lambda document: _hash(document["name"]))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_validation(name: str) -> bool:
    """Whether the document of this name belongs to the validation split (about 5%)."""
    return _hash(name) % 100 < VALIDATION_PERCENT


def train_tokenizer(texts: list[str], vocab_size: int = VOCAB_SIZE):
    """Train a byte-level BPE tokenizer that puts a BOS token before every text; EOS is for who ends a document.

    Returns:
        A ``tokenizers.Tokenizer`` with ``vocab_size`` entries (fewer if the text has
        too few merges).
    """
    from tokenizers import decoders, models, pre_tokenizers, processors, Tokenizer, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return tokenizer


def _write_jsonl(path: Path, documents: list[dict[str, str]]) -> int:
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    path.write_text("".join(lines), encoding="utf-8")
    return path.stat().st_size


def prepare_stdlib_assets(folder: Path, vocab_size: int = VOCAB_SIZE) -> dict:
    """Write corpus and tokenizer into ``folder``, unless this Python already did.

    Files: ``train.jsonl``, ``validation.jsonl`` (fields ``name`` and ``text``),
    ``tokenizer.json``, ``tokenizer_config.json`` and ``manifest.json``. They appear
    together or not at all.

    Returns:
        The manifest: Python version, documents and bytes per split; ``"new"`` says
        whether anything was written.
    """
    version = {"format": _FORMAT, "python": sys.version, "vocab_size": vocab_size}
    if found := _manifest(folder, version):
        return {**found, "new": False}
    documents = stdlib_documents()
    splits = {
        "train": [doc for doc in documents if not is_validation(doc["name"])],
        "validation": [doc for doc in documents if is_validation(doc["name"])],
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        draft = Path(scratch) / "draft"
        draft.mkdir()
        manifest = dict(version)
        for split, docs in splits.items():
            size = _write_jsonl(draft / f"{split}.jsonl", docs)
            manifest[split] = {"documents": len(docs), "bytes": size}
        tokenizer = train_tokenizer([doc["text"] for doc in splits["train"]], vocab_size)
        tokenizer.save(str(draft / "tokenizer.json"))
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "add_bos_token": True,
            "add_eos_token": False,
        }
        (draft / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
        (draft / "manifest.json").write_text(json.dumps(manifest, indent=2))
        # Another process may have been at it, and others read its files already.
        if not _manifest(folder, version):
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
    return {**manifest, "new": True}


def _manifest(folder: Path, version: dict) -> dict | None:
    """The manifest of a folder, if it is of this version."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        # Damaged: it is made again.
        return None
    return manifest if {key: manifest.get(key) for key in version} == version else None


if __name__ == "__main__":
    json.dump(list(_docstrings_of_compiled_modules()), sys.stdout)
