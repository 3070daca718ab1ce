"""Text data: local files, Hugging Face datasets and weighted mixtures of them."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from nitp_titan.data.mixtures import TextSource
from nitp_titan.data.packing import (
    Batch,
    open_documents,
    PackedText,
    Stream,
)
from nitp_titan.data.sources import (
    check_source,
    configured_sources,
    ConfiguredSource,
    described,
    how_to_make,
    is_streamed,
    left_out,
    open_source,
    shared_text,
    tokens_of,
)
from nitp_titan.data.text_sets import TextStream
from nitp_titan.data.tokens.folder import check_tokenizer, TokenFolder, TOKENS
from nitp_titan.errors import UserError

_WORKER_KEYS = ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor")


class TextDataLoader(ParallelAwareDataloader):
    """Packed text of one source or of a weighted mixture; positions restart with every document.

    Each source packs its own documents into sequences, and a seeded draw chooses the source of every sequence: the
    weights are shares of the tokens. The state gives the same following sequences on any number of ranks (`packing`).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        dataset: str = "json"
        """``json`` (JSON lines, also gzipped, and ``.txt``) or ``parquet`` for local files, ``tokens`` for a folder
        that scripts/tokenize_data.py made, else a Hugging Face dataset ``owner/name``."""

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

        num_streams: int | None = None
        """Streams that the documents of each source are dealt to, which decides the order of the sequences. A rank
        reads its own streams only where this is a multiple of the number of data-parallel ranks; with 1 every rank
        reads everything. Default: 1; of validation, that of training."""

        shuffle: bool = False
        """Shuffle the documents of each stream in the first epoch too; in later ones those of indexed sources always
        are."""

        infinite: bool = True
        """Start again at the end; else a stream ends with the first of its sources that does."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        table: str = "dataloader",
        **kwargs,
    ):
        check_dataset(config, table)
        self.config, num_streams = config, config.num_streams or 1
        if num_streams % dp_world_size and dp_rank == 0:
            logger.warning(
                f"[dataloader] num_streams = {num_streams} is not a multiple of {dp_world_size} data-parallel ranks: "
                f"for [{table}], each of them also reads and tokenizes the streams of other ranks."
            )
        entries = configured_sources(config, table)
        opened = [_opened(entry, tokenizer) for entry in entries]
        self.num_documents = [len(data) if isinstance(data, Dataset) else None for data, _ in opened]
        """Of every source; None for a streamed one."""
        for entry, (documents, _) in zip(entries, opened):
            logger.info(f"[{entry.table}] {described(entry, documents)}")
            if dp_rank == 0 and (others := left_out(entry)):
                logger.warning(f"[{entry.table}] {others}")

        def open_streams(source: int, states: dict[int, dict[str, Any] | None]) -> dict[int, Stream]:
            entry, (data, encode) = entries[source], opened[source]
            begun = {stream: state and state["document"] for stream, state in states.items()}
            documents = open_documents(data, begun, num_streams, shuffle=config.shuffle)

            def packed(stream: int) -> Stream:
                part = f", stream {stream + 1} of num_streams = {num_streams}," if num_streams > 1 else ""
                return Stream(
                    documents[stream],
                    encode,
                    seq_len=seq_len,
                    infinite=config.infinite,
                    name=entry.name + part,
                    empty=entry.error("dataset_path", f" = '{entry.name}'{part} holds no text."),
                    state=states[stream],
                )

            return {stream: packed(stream) for stream in states}

        self.dataset: PackedText
        self._state: dict[str, Any] | None = None
        self.any_rank: Callable[[bool], bool] = bool
        """Whether any rank has more finite data, asked after each batch of this one; by default, on this rank."""
        super().__init__(
            PackedText(
                open_streams,
                weights=[entry.source.weight for entry in entries],
                seed=config.seed,
                num_streams=num_streams,
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
            if not self.config.infinite and not self.any_rank(batch.found):
                return
            self._state = batch.state
            yield batch.inputs, batch.labels

    def state_dict(self) -> dict[str, Any]:
        """State after the last batch that was handed out; each rank gives the streams that it reads."""
        state = self._state or self.dataset.start
        streams = {f"stream_{stream}": json.dumps(by_source) for stream, by_source in state["streams"].items()}
        return {"num_streams": self.dataset.num_streams, "sequence": state["sequence"], **streams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, taken on any number of ranks.

        Raises:
            UserError: if it is of data with other sources or another number of streams.
        """
        if not state_dict:
            return
        if state_dict["num_streams"] != self.dataset.num_streams:
            raise UserError(
                f"[dataloader] num_streams = {self.dataset.num_streams}, but the checkpoint's data is in "
                f"{state_dict['num_streams']} streams.",
                table="dataloader",
                key="num_streams",
            )
        streams = {stream: json.loads(state_dict[f"stream_{stream}"]) for stream in self.dataset.streams}
        num_sources = len(self.dataset.beginning["streams"][self.dataset.streams[0]])
        other = next((len(found) for found in streams.values() if found is not None), num_sources)
        if num_sources != other:
            raise UserError(
                f"[dataloader] has {num_sources} sources, but the checkpoint's data has {other}.", table="dataloader"
            )
        self._start_from({"sequence": state_dict["sequence"], "streams": streams})

    def rewind(self) -> None:
        """Begin again with the first batch; sources stay open."""
        self._start_from(self.dataset.beginning)

    def _start_from(self, state: dict[str, Any]) -> None:
        self.dataset.start = state
        self._state = None
        # A worker that stays alive has a data set of its own.
        self._iterator = None


def _unchanged(batch: Batch) -> Batch:
    return batch


def _opened(
    entry: ConfiguredSource, tokenizer: BaseTokenizer
) -> tuple[Dataset | IterableDataset | TextStream, Callable]:
    """Documents of a source, and the function that gives the tokens of one."""
    if entry.source.dataset == TOKENS:
        folder = TokenFolder(entry)
        return folder.documents(), folder.tokens_of
    return open_source(entry), partial(tokens_of, entry=entry, tokenizer=tokenizer)


def check_sources(config) -> None:
    """Raise UserError unless a ``Trainer.Config``'s tokenizer and local text are there; before anything is built."""
    tokenizer = Path(config.hf_assets_path) / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(
            f"hf_assets_path = '{config.hf_assets_path}' holds no tokenizer.json.{how_to_make(config.hf_assets_path)}",
            table="",
            key="hf_assets_path",
        )
    sources = {"dataloader": config.dataloader}
    if config.validator.enable:
        sources["validator.dataloader"] = config.validator.dataloader
    for table, source in sources.items():
        if isinstance(source, TextDataLoader.Config):
            check_dataset(source, table)
            for entry in configured_sources(source, table):
                if entry.source.dataset == TOKENS:
                    check_tokenizer(entry, config.hf_assets_path)
    _warn_of_shared_text(sources)


def _warn_of_shared_text(sources: dict[str, Any]) -> None:
    configs = {table: given for table, given in sources.items() if isinstance(given, TextDataLoader.Config)}
    entries = [configured_sources(config, table) for table, config in configs.items()]
    if len(entries) == 2 and (name := shared_text(*entries)) and os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"[validator.dataloader] reads '{name}', which [dataloader] trains on: its losses are not of new text."
        )


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
    for entry in configured_sources(config, table):
        check_source(entry)
        if config.shuffle and is_streamed(entry.source):
            raise UserError(
                f"[{table}] shuffle = true, but '{entry.name}' is streamed, and only an indexed source can be shuffled "
                "and resumed exactly: set its streaming = false, or tokenize it (scripts/tokenize_data.py).",
                table=table,
                key="shuffle",
            )
