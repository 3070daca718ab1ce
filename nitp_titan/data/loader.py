"""Text data: local files, Hugging Face datasets and weighted mixtures of them."""

import dataclasses
import glob
import gzip
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
from torchtitan.tools.logging import logger

from nitp_titan.config import nearest, UserError
from nitp_titan.data.mixtures import MIXTURES, TextSource
from nitp_titan.data.packing import Batch, Documents, PackedText, Stream
from nitp_titan.hub import TOKENIZERS, without_download_counts

# Files of a folder. Plain *.json is left out: a folder of text often holds a manifest of that name.
_PATTERNS = {"json": ("*.jsonl", "*.jsonl.gz", "*.json.gz"), "parquet": ("*.parquet",)}
# Characters; a line without end must not fill the memory.
_LONGEST_LINE = 100_000_000
_SOURCE_KEYS = [field.name for field in dataclasses.fields(TextSource) if field.name != "weight"]
_WORKER_KEYS = ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor")


class TextDataLoader(ParallelAwareDataloader):
    """Packed text of one source or of a weighted mixture; positions restart with every document.

    Each source packs its own documents into sequences, and a seeded draw chooses the source of every sequence: the
    weights are shares of the tokens. The state gives the same following sequences on any number of ranks (`packing`).
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
        """Name of a registered mixture (nitp_titan/data/mixtures.py) instead of one source."""

        sources: list[TextSource] = field(default_factory=list)
        """Sources of a mixture with their weights, instead of one source."""

        seed: int = 42
        """Seed of the draw of sources."""

        num_shards: int = 1
        """Parts that each source is read in, which decides the order of the sequences. A rank reads its own parts
        only where this is a multiple of the number of data-parallel ranks; with 1 every rank reads everything."""

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
        **kwargs,
    ):
        check_dataset(config)
        if config.infinite and config.num_shards % dp_world_size:
            logger.warning(
                f"[dataloader] num_shards = {config.num_shards} is no multiple of {dp_world_size} data-parallel ranks: "
                "each of them also reads and tokenizes what others train."
            )
        places = _places(config, "dataloader")
        opened = [_load(place) for place in places]

        def open_stream(source: int, shard: int, state: dict[str, Any] | None) -> Stream:
            place = places[source]
            part = f", part {shard + 1} of {config.num_shards}," if config.num_shards > 1 else ""
            return Stream(
                partial(Documents, opened[source], shard, config.num_shards),
                partial(_tokens, place=place, tokenizer=tokenizer),
                seq_len=seq_len,
                infinite=config.infinite,
                name=place.name + part,
                empty=place.error("dataset_path", f" = '{place.name}'{part} holds no text."),
                state=state,
            )

        self.dataset: PackedText
        self._state: dict[str, Any] | None = None
        super().__init__(
            PackedText(
                open_stream,
                weights=[place.source.weight for place in places],
                seed=config.seed,
                num_shards=config.num_shards,
                seq_len=seq_len,
                batch_size=local_batch_size,
                rank=dp_rank,
                num_ranks=dp_world_size,
            ),
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            # The data set makes whole batches, each with the state after it.
            batch_size=None,
            collate_fn=_unchanged,
            **{key: getattr(config, key) for key in _WORKER_KEYS},
        )

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for batch in super().__iter__():
            self._state = batch.state
            yield batch.inputs, batch.labels

    def state_dict(self) -> dict[str, Any]:
        """State after the last batch that was handed out; each rank gives the parts that it reads."""
        state = self._state or self.dataset.start
        shards = {f"shard_{shard}": json.dumps(streams) for shard, streams in state["shards"].items()}
        return {"num_shards": self.dataset.num_shards, "sequence": state["sequence"], **shards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, taken on any number of ranks.

        Raises:
            UserError: if it is of data with other sources or other parts.
        """
        if not state_dict:
            return
        if state_dict["num_shards"] != self.dataset.num_shards:
            raise UserError(
                f"[dataloader] num_shards = {self.dataset.num_shards}, but the checkpoint's data is in "
                f"{state_dict['num_shards']} parts.",
                table="dataloader",
                key="num_shards",
            )
        shards = {shard: json.loads(state_dict[f"shard_{shard}"]) for shard in self.dataset.shards}
        num_sources = [len(streams) for streams in self.dataset.start["shards"].values()]
        if num_sources != [len(streams) for streams in shards.values()]:
            raise UserError(
                f"[dataloader] has {num_sources[0]} sources, but the checkpoint's data has "
                f"{len(next(iter(shards.values())))}.",
                table="dataloader",
            )
        self.dataset.start = {"sequence": state_dict["sequence"], "shards": shards}
        self._state = None


def _unchanged(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class _Place:
    """A source and the place in a config that names it."""

    source: TextSource
    table: str
    key: str | None = None
    prefix: str = ""

    @property
    def name(self) -> str:
        return self.source.dataset_path or self.source.dataset

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
            f"[{table}] num_workers = {config.num_workers}, but it must be 0 or 1: each worker would read the same "
            "documents.",
            table=table,
            key="num_workers",
        )
    if config.num_shards < 1 or (config.num_shards > 1 and not config.infinite):
        raise UserError(
            f"[{table}] num_shards = {config.num_shards}, but it must be 1 for finite data (infinite = false), else at "
            "least 1.",
            table=table,
            key="num_shards",
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
        except (OSError, EOFError, ValueError, RecursionError, zlib.error):
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
        return json.loads(stream.readline(_LONGEST_LINE))


def _first_row(file: str) -> dict[str, Any] | None:
    with pyarrow.parquet.ParquetFile(file) as parquet:
        rows = (row for batch in parquet.iter_batches(batch_size=1) for row in batch.to_pylist())
        return next(rows, None)


def _load(place: _Place):
    source, path = place.source, place.name
    is_local = source.dataset in _PATTERNS
    streaming = not is_local if source.streaming is None else source.streaming
    without_download_counts()
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
            where = where or f"dataset '{place.name}'"
            raise place.error(
                "text_field",
                f" = '{name}': a document of {where} has no such text.{nearest(name, list(document))}",
            )
    return "\n\n".join(document[name] for name in fields)


def _tokens(document: dict[str, Any], *, place: _Place, tokenizer: BaseTokenizer) -> list[int]:
    return tokenizer.encode(_text(document, place=place), add_bos=True, add_eos=True)
