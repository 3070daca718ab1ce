"""Text data: local files, Hugging Face datasets and weighted mixtures of them, packed by TorchTitan's datasets."""

import dataclasses
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from datasets import load_dataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.interleaved import InterleavedDataset
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset

from nitp_titan.config import nearest, UserError
from nitp_titan.hub import TOKENIZERS
from nitp_titan.mixtures import MIXTURES, TextSource

# Files of a folder. Plain *.json is left out: a folder of text often holds a manifest of that name.
_PATTERNS = {"json": ("*.jsonl", "*.jsonl.gz", "*.json.gz"), "parquet": ("*.parquet",)}
_SOURCE_KEYS = [field.name for field in dataclasses.fields(TextSource) if field.name != "weight"]
_WORKER_KEYS = ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor")


class TextDataset(HuggingFaceTextDataset):
    """TorchTitan's packed text, with a state that is exact whenever it is taken and loaded.

    Upstream, a streamed source that is not drawn between two checkpoints is saved as unread, because a loaded state
    counts only once it is read on; whole sequences of a loaded state wait for one more document, which does not
    come at the end of finite data; and the state shares its buffers with the running dataset, so that a data worker
    changes them while they are sent.
    """

    _unread: dict[str, Any] | None = None

    def __iter__(self):
        yield from self._held_sequences()
        self._unread = None
        yield from super().__iter__()

    def _held_sequences(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        length = self.seq_len
        while len(self._inputs_buffer) >= length:
            inputs, labels = torch.tensor(self._inputs_buffer[:length]), torch.tensor(self._labels_buffer[:length])
            positions = torch.tensor(self._normalize_positions(self._positions_buffer[:length]))
            self._inputs_buffer = self._inputs_buffer[length:]
            self._labels_buffer = self._labels_buffer[length:]
            self._positions_buffer = self._positions_buffer[length:]
            yield {"input": inputs, "positions": positions}, labels

    def remainder(self) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        """What finite data leaves over at its end: a shorter sequence, which training drops; None if there is none."""
        if not self._inputs_buffer:
            return None
        positions = torch.tensor(self._normalize_positions(self._positions_buffer.copy()))
        inputs = {"input": torch.tensor(self._inputs_buffer), "positions": positions}
        return inputs, torch.tensor(self._labels_buffer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._unread = state_dict.get("data")

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._unread is not None:
            state["data"] = self._unread
        return {key: value.copy() if isinstance(value, list) else value for key, value in state.items()}


class TextDataLoader(ParallelAwareDataloader):
    """Packed text of one source or of a weighted mixture; positions restart with every document.

    Each source packs its own documents into sequences, and a seeded draw chooses the source of every sequence: the
    weights are shares of the tokens. The same state gives the same following batches, on the same number of ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        dataset: str = "json"
        """``json`` (JSON lines, also gzipped) or ``parquet`` for local files, else a Hugging Face dataset
        ``owner/name``."""

        text_field: str | list[str] = "text"
        """Field of a document that holds its text; of several fields the texts are joined by an empty line."""

        subset: str | None = None
        """Configuration of a Hugging Face dataset, for example ``en`` of allenai/c4."""

        split: str = "train"
        """Split of a Hugging Face dataset."""

        streaming: bool | None = None
        """Read on the fly instead of preparing an indexed copy first. Default: Hugging Face datasets yes, local
        files no."""

        mixture: str | None = None
        """Name of a registered mixture (nitp_titan/mixtures.py) instead of one source."""

        sources: list[TextSource] = field(default_factory=list)
        """Sources of a mixture with their weights, instead of one source."""

        seed: int = 42
        """Seed of the draw of sources; each data-parallel rank has its own draw."""

        infinite: bool = True
        """Start again at the end; else a mixture ends with the first source that does."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = 1,
        **kwargs,
    ):
        check_dataset(config)
        places = _places(config, "dataloader")
        datasets = [
            TextDataset(_register(place), None, tokenizer, seq_len, dp_rank, dp_world_size, config.infinite)
            for place in places
        ]
        mixed = InterleavedDataset(
            datasets,
            weights=[place.source.weight for place in places],
            # One draw for all ranks would give all of them the same source at once.
            seed=config.seed * dp_world_size + dp_rank,
        )
        super().__init__(
            mixed if len(datasets) > 1 else datasets[0],
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=local_batch_size,
            snapshot_every_n_steps=snapshot_every_n_steps,
            **{key: getattr(config, key) for key in _WORKER_KEYS},
        )


@dataclass(frozen=True)
class _Place:
    """A source and the place in a config that names it."""

    source: TextSource
    table: str
    key: str | None = None
    prefix: str = ""

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"[{self.table}] {self.prefix}{key}{message}", table=self.table, key=self.key or key)


def _places(config: TextDataLoader.Config, table: str) -> list[_Place]:
    """Sources of a config, given in one of three ways."""
    _check_one_way(config, table)
    if config.mixture is not None:
        prefix = f"mixture = '{config.mixture}', source {{}}: "
        key, sources = "mixture", MIXTURES[config.mixture]
    elif config.sources:
        prefix, key, sources = "sources[{}].", "sources", config.sources
    else:
        return [_Place(TextSource(**{key: getattr(config, key) for key in _SOURCE_KEYS}), table)]
    return [_Place(source, table, key, prefix.format(index)) for index, source in enumerate(sources)]


def _check_one_way(config: TextDataLoader.Config, table: str) -> None:
    default = type(config)()
    given = [key for key in (*_SOURCE_KEYS, "mixture", "sources") if getattr(config, key) != getattr(default, key)]
    if len(given) > 1 and {"mixture", "sources"} & set(given):
        raise UserError(
            f"[{table}] has {', '.join(given[:-1])} and {given[-1]}: give either one source by its own keys, "
            "or mixture, or sources.",
            table=table,
            key=given[-1],
        )
    if config.mixture is not None and config.mixture not in MIXTURES:
        raise UserError(
            f"[{table}] mixture = '{config.mixture}' is not registered.{nearest(config.mixture, [*MIXTURES])}",
            table=table,
            key="mixture",
        )


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
    name = Path(path).name
    if name in TOKENIZERS:
        return f" Run `python scripts/download_assets.py {name}` to fetch it."
    return " Run `python scripts/prepare_assets.py` to make it." if "assets/stdlib" in path else ""


def check_dataset(config: TextDataLoader.Config, table: str = "dataloader") -> None:
    """Raise UserError unless every source is well named and its local files begin with a document.

    Touches no network: a Hugging Face dataset is checked when it is opened.
    """
    if config.num_workers > 1:
        raise UserError(
            f"[{table}] num_workers = {config.num_workers}, but it must be 0 or 1: TorchTitan's text datasets give "
            "every worker the same documents.",
            table=table,
            key="num_workers",
        )
    for place in _places(config, table):
        _check_source(place)


def _check_source(place: _Place) -> None:
    source = place.source
    if not 0 < source.weight < float("inf"):
        raise place.error("weight", f" = {source.weight!r}, but it must be a finite number above 0.")
    if not source.text_field:
        raise place.error("text_field", f" = {source.text_field!r} names no field.")
    if source.dataset in _PATTERNS:
        _check_files(place)
    elif "/" not in source.dataset:
        raise place.error(
            "dataset",
            f" = '{source.dataset}' is neither 'json' nor 'parquet' nor a Hugging Face dataset 'owner/name'."
            f"{nearest(source.dataset, [*_PATTERNS])}",
        )


def _check_files(place: _Place) -> None:
    source = place.source
    if not source.dataset_path:
        raise place.error("dataset_path", f" is missing: dataset = '{source.dataset}' needs a file, folder or pattern.")
    files = local_files(source.dataset_path, source.dataset)
    if not files:
        raise place.error(
            "dataset_path", f" = '{source.dataset_path}' names no file.{_how_to_make(source.dataset_path)}"
        )
    first, what = {
        "json": (_first_json, "line 1 is not a JSON object"),
        "parquet": (_first_row, "there is no first row: not a parquet file, or an empty one"),
    }[source.dataset]
    for file in files:
        try:
            document = first(file)
        except (OSError, EOFError, ValueError, zlib.error):
            document = None
        if not isinstance(document, dict):
            raise place.error("dataset_path", f": {file}, {what}.")
        _text(document, place=place, where=f"{file}, {'line' if source.dataset == 'json' else 'row'} 1")


def local_files(path: str, kind: str = "json") -> list[str]:
    """Files that a path, a folder or a glob pattern names, sorted; of a folder those of the kind json or parquet."""
    folder = Path(path)
    patterns = [str(folder / pattern) for pattern in _PATTERNS[kind]] if folder.is_dir() else [path]
    return sorted(name for pattern in patterns for name in glob.glob(pattern) if Path(name).is_file())


def _first_json(file: str) -> Any:
    opened = gzip.open if file.endswith(".gz") else open
    with opened(file, "rt", encoding="utf-8") as stream:
        return json.loads(stream.readline())


def _first_row(file: str) -> dict[str, Any] | None:
    with pyarrow.parquet.ParquetFile(file) as parquet:
        rows = (row for batch in parquet.iter_batches(batch_size=1) for row in batch.to_pylist())
        return next(rows, None)


def _register(place: _Place) -> str:
    """Name under which TorchTitan's dataset finds the source in its registry."""
    # Lower case is TorchTitan's rule.
    name = f"{place.source.dataset.lower()}-{hashlib.sha256(repr(place).encode()).hexdigest()[:8]}"
    DATASETS[name] = DatasetConfig(
        path=place.source.dataset_path or place.source.dataset,
        loader=partial(_load, place=place),
        sample_processor=partial(_text, place=place),
    )
    return name


def _load(path: str, *, place: _Place):
    source = place.source
    is_local = source.dataset in _PATTERNS
    streaming = not is_local if source.streaming is None else source.streaming
    try:
        if is_local:
            files = local_files(path, source.dataset)
            return load_dataset(source.dataset, data_files=files, split="train", streaming=streaming)
        return load_dataset(path, name=source.subset, split=source.split, streaming=streaming)
    except Exception as error:
        # `datasets` raises many types here; each of them means that what the config names is wrong.
        kinds = {"json": "line is a JSON object", "parquet": "file is a table"}
        said = (
            f" = '{path}': not every {kinds[source.dataset]} with the fields of the first"
            if is_local
            else f" = '{path}' (subset {source.subset!r}, split {source.split!r}) could not be opened"
        )
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise place.error("dataset_path" if is_local else "dataset", f"{said}: {reason}") from error


def _text(document: dict[str, Any], *, place: _Place, where: str | None = None) -> str:
    source = place.source
    fields = [source.text_field] if isinstance(source.text_field, str) else source.text_field
    for name in fields:
        if not isinstance(document.get(name), str):
            where = where or f"dataset '{source.dataset_path or source.dataset}'"
            raise place.error(
                "text_field",
                f" = '{name}': a document of {where} has no such text.{nearest(name, list(document))}",
            )
    return "\n\n".join(document[name] for name in fields)
