"""Text data: local JSON-lines files or any Hugging Face text dataset, packed by TorchTitan's loader."""

import glob
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import load_dataset
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import derive
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader

from nitp_titan.config import nearest, UserError


class TextDataLoader(HuggingFaceTextDataLoader):
    """TorchTitan's text loader with the dataset given by the config instead of a registry.

    Documents are packed into sequences; positions restart with every document.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTextDataLoader.Config):
        dataset: str = "json"
        """``json`` for local JSON-lines files, else the name of a Hugging Face dataset."""

        text_field: str = "text"
        """Field of a document that holds its text."""

        subset: str | None = None
        """Configuration of a Hugging Face dataset, for example ``en`` of allenai/c4."""

        split: str = "train"
        """Split of a Hugging Face dataset."""

        streaming: bool = True
        """Stream a Hugging Face dataset instead of downloading it first."""

    def __init__(self, config: Config, *, tokenizer: BaseTokenizer, **kwargs):
        check_dataset(config)
        source = [config.dataset, config.dataset_path, config.text_field, config.subset, config.split, config.streaming]
        # TorchTitan's loader finds datasets by name in this registry; lower case is its rule.
        name = f"{config.dataset.lower()}-{hashlib.sha256(repr(source).encode()).hexdigest()[:8]}"
        DATASETS[name] = DatasetConfig(
            path=config.dataset_path or config.dataset,
            loader=partial(_load, config=config),
            sample_processor=partial(_text, config=config),
        )
        registered = derive(config, HuggingFaceTextDataLoader.Config, dataset=name)
        super().__init__(registered, tokenizer=tokenizer, **kwargs)


def check_sources(config) -> None:
    """Raise UserError unless a ``Trainer.Config``'s tokenizer and local text are there; before anything is built."""
    tokenizer = Path(config.hf_assets_path) / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(
            f"hf_assets_path = '{config.hf_assets_path}' holds no tokenizer.json.{_how_to_make(config.hf_assets_path)}",
            table="",
            key="hf_assets_path",
        )
    sources = {"dataloader": config.dataloader}
    if config.validator.enable:
        sources["validator.dataloader"] = config.validator.dataloader
    for table, source in sources.items():
        if isinstance(source, TextDataLoader.Config):
            check_dataset(source, table)


def _how_to_make(path: str) -> str:
    return " Run `python scripts/prepare_assets.py` to make it." if "assets/stdlib" in path else ""


def local_files(pattern: str) -> list[str]:
    """Files that a path, a folder (its ``*.jsonl``) or a glob pattern names, sorted."""
    if Path(pattern).is_dir():
        pattern = str(Path(pattern) / "*.jsonl")
    return sorted(path for path in glob.glob(pattern) if Path(path).is_file())


def check_dataset(config: TextDataLoader.Config, table: str = "dataloader") -> None:
    """Raise UserError unless local files exist and their first document has the text field.

    Touches no network: a Hugging Face dataset is checked when it is opened.
    """
    if config.dataset != "json":
        return
    if not config.dataset_path:
        raise UserError(
            f"[{table}] dataset_path is missing: dataset = 'json' needs a JSON-lines file, folder or pattern.",
            table=table,
            key="dataset_path",
        )
    files = local_files(config.dataset_path)
    if not files:
        raise UserError(
            f"[{table}] dataset_path = '{config.dataset_path}' names no file.{_how_to_make(config.dataset_path)}",
            table=table,
            key="dataset_path",
        )
    for file in files:
        with open(file, encoding="utf-8") as stream:
            first = stream.readline()
        try:
            document = json.loads(first)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise UserError(
                f"[{table}] dataset_path: {file}, line 1 is not a JSON object.", table=table, key="dataset_path"
            )
        _text(document, config=config, place=f"{file}, line 1", table=table)


def _load(path: str, *, config: TextDataLoader.Config):
    is_local = config.dataset == "json"
    try:
        if is_local:
            return load_dataset("json", data_files=local_files(path), split="train")
        return load_dataset(path, name=config.subset, split=config.split, streaming=config.streaming)
    except Exception as error:
        # `datasets` raises many types here; each of them means that what the config names is wrong.
        source = (
            f"dataset_path = '{path}': not every line is a JSON object with the fields of the first"
            if is_local
            else f"dataset = '{path}' (subset {config.subset!r}, split {config.split!r}) could not be opened"
        )
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        key = "dataset_path" if is_local else "dataset"
        raise UserError(f"[dataloader] {source}: {reason}", table="dataloader", key=key) from error


def _text(
    document: dict[str, Any], *, config: TextDataLoader.Config, place: str | None = None, table: str = "dataloader"
) -> str:
    text = document.get(config.text_field)
    if not isinstance(text, str):
        place = place or f"dataset '{config.dataset_path or config.dataset}'"
        raise UserError(
            f"[{table}] text_field = '{config.text_field}': a document of {place} has no such text."
            f"{nearest(config.text_field, list(document))}",
            table=table,
            key="text_field",
        )
    return text
