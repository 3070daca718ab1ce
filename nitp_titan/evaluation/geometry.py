"""Geometry of pretrained models on a text: the statistics of training, for any causal LM that transformers loads.

Needs transformers, which the extra ``eval`` installs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TYPE_CHECKING

import torch
from torch import nn, Tensor

from nitp_titan.data.text_files import documents_of
from nitp_titan.errors import nearest_choice, UserError
from nitp_titan.evaluation.hidden_states import decoder_layers, measure
from nitp_titan.evaluation.pretrained import load_pretrained, Model, require, without_bos
from nitp_titan.export.dtypes import DTYPES
from nitp_titan.progress import log_line, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, kw_only=True)
class GeometrySettings:
    """What is measured and how, each field as the flag of `scripts/geometry.py` with its name.

    Raises:
        UserError: naming the flag, its value and what is allowed.
    """

    text: Path
    """Documents: paragraphs of a ``.txt`` file between blank lines, rows of parquet, else JSON lines."""

    text_field: str = "text"
    """Field of the objects or rows that holds the text."""

    seq_len: int = 512
    """The first so many tokens of a document are one sequence; the rest of it is not measured."""

    tokens: int = 100_000
    """The text ends before the document with which the first model would have more."""

    batch_size: int = 8
    dtype: str = "float32"
    device: str = "auto"
    """``cpu``, ``cuda`` or ``cuda:N``; ``auto`` takes a GPU if there is one."""

    num_pairs: int = 1024
    """Pairs of tokens of different sequences whose cosine is averaged (App. D)."""

    seed: int = 0
    """Of the pairs."""

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 1), ("tokens", 2), ("batch_size", 1), ("num_pairs", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least {least}.")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: there is no such type.{nearest_choice(self.dtype, list(DTYPES))}")
        self.torch_device()

    def torch_device(self) -> torch.device:
        """The device that ``device`` stands for; UserError if this machine has none such."""
        num_gpus = torch.cuda.device_count()
        if self.device == "auto":
            return torch.device("cuda" if num_gpus else "cpu")
        # Others, such as mps, lack the float64 of the sums.
        kind, _, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
            near = nearest_choice(kind, ["auto", "cpu", "cuda"])
            raise UserError(f"--device {self.device}: it must be auto, cpu, cuda or cuda:N.{near}")
        if kind == "cuda" and int(index or 0) >= num_gpus:
            raise UserError(f"--device {self.device}: this machine has {num_gpus} GPUs; cpu works everywhere.")
        return torch.device(self.device)


def tokenized(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", seq_len: int, max_tokens: float = float("inf")
) -> Iterator[Tensor]:
    """The first tokens of every document, with the special tokens that the tokenizer adds by itself.

    Yields:
        [up to ``seq_len``], int32; it ends before more than ``max_tokens`` in all.
    """
    total = 0
    for document in documents:
        # Cut here, not by the tokenizer: it would move the token that ends a document to the cut.
        # The string of a special token is text, as in training.
        ids = tokenizer(document, verbose=False, split_special_tokens=True)["input_ids"][:seq_len]
        total += len(ids)
        if total > max_tokens:
            return
        yield torch.tensor(ids, dtype=torch.int32)


def check(settings: GeometrySettings) -> None:
    """Raise UserError unless transformers is installed and the text holds the two documents that pairs need."""
    require("transformers")
    number = len(list(islice(documents_of(settings.text, settings.text_field), 2)))
    if number < 2:
        raise UserError(
            f"--text {settings.text} holds {number or 'no'} document{'s' * (number != 1)}; at least 2 are needed, "
            "for pairs of tokens of different ones. A .txt file is divided at blank lines."
        )


def measure_models(models: Sequence[Model], settings: GeometrySettings) -> dict[str, Any]:
    """Measure models, one after another, on the same documents.

    Args:
        models: from `pretrained.read_models`; the others are compared with the first.

    Returns:
        What `geometry.json` holds: ``settings``, ``versions``, ``warnings`` and per model its ``name``, ``model``,
        ``tokens``, ``sequences``, ``seq_len``, ``dim``, ``num_layers`` and ``states``.

    Raises:
        UserError: if the text is too short, or a model does not load or does not fit its tokenizer.
    """
    import transformers

    check(settings)
    measured: list[dict[str, Any]] = []
    warnings: list[str] = []
    for name, source in ((model.name, model.source) for model in models):
        log_line(f"{name}: loading {source}")
        num_documents = measured[0]["sequences"] if measured else None
        try:
            model_geometry, messages = _measure_one(name, source, settings, num_documents)
        except torch.OutOfMemoryError:
            way_out = "lower --batch-size or --seq-len, or take --dtype bfloat16 or --device cpu"
            raise UserError(f"{name} does not fit into the memory of {settings.torch_device()}; {way_out}.") from None
        measured.append(model_geometry)
        warnings += [f"{name}: {message}" for message in messages]
    return {
        "settings": asdict(settings) | {"text": str(settings.text), "device": str(settings.torch_device())},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "warnings": warnings + _not_alike(measured),
        "models": measured,
    }


def _measure_one(
    name: str, source: str, settings: GeometrySettings, num_documents: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Figures of a model and warnings; without a number of documents ``settings.tokens`` ends the text."""
    model, tokenizer = load_pretrained(source, dtype=settings.dtype, device=settings.torch_device())
    warnings = without_bos(tokenizer, "sequences")
    config, seq_len = model.config.get_text_config(), settings.seq_len
    num_layers = len(decoder_layers(model.get_decoder()))
    longest = getattr(config, "max_position_embeddings", None) or seq_len
    if 0 < longest < seq_len:
        warnings.append(f"--seq-len {seq_len} is beyond its max_position_embeddings; {longest} is taken.")
        seq_len = longest
    documents = islice(documents_of(settings.text, settings.text_field), num_documents)
    limit = settings.tokens if num_documents is None else float("inf")
    sequences = list(tokenized(documents, tokenizer, seq_len, limit))
    _check_sequences(sequences, model, source, settings)
    num_tokens = sum(map(len, sequences))
    states, left_out = measure(
        model,
        sequences,
        batch_size=settings.batch_size,
        num_pairs=settings.num_pairs,
        seed=settings.seed,
        count_tokens=_token_counter(name, num_tokens),
    )
    warnings += left_out
    if num_tokens <= config.hidden_size:
        warnings.append(f"{num_tokens:,} tokens at dim {config.hidden_size:,}: no rank is above {num_tokens - 1:,}.")
    sizes = {"tokens": num_tokens, "sequences": len(sequences), "seq_len": seq_len}
    shape = {"dim": config.hidden_size, "num_layers": num_layers}
    return {"name": name, "model": source, **sizes, **shape, "states": states}, warnings


def _token_counter(name: str, num_tokens: int) -> Callable[[int], None]:
    """A function to call with the tokens of every batch; it prints a line every few seconds and at the end."""
    progress = Progress(num_tokens, "tokens", seconds_between_lines=_SECONDS_BETWEEN_LINES)

    def count(tokens: int) -> None:
        progress.add(tokens)
        if progress.line_is_due() or progress.done == num_tokens:
            log_line(f"{name}: {progress}, {progress.speed():,.0f} tokens/s")

    return count


def _check_sequences(sequences: Sequence[Tensor], model: nn.Module, source: str, settings: GeometrySettings) -> None:
    if sum(len(ids) > 0 for ids in sequences) < 2:
        raise UserError(
            f"--tokens {settings.tokens}: fewer than 2 documents of {settings.text} fit, of up to --seq-len "
            f"{settings.seq_len} tokens each; {2 * settings.seq_len} are always enough."
        )
    largest, rows = max(int(ids.max()) for ids in sequences if len(ids)), len(model.get_input_embeddings().weight)
    if largest >= rows:
        raise UserError(f"{source}: its tokenizer made token {largest}, but its embedding has {rows} rows.")


def _not_alike(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Why models did not read the same tokens, a line for each that differs from the first."""
    lines = []
    for first, other in ((measured[0], one) for one in measured[1:]):
        count = f"{other['tokens']:,} tokens of the same {first['sequences']:,} documents, {first['name']}"
        if other["seq_len"] != first["seq_len"]:
            least = min(first["seq_len"], other["seq_len"])
            lines.append(f"{other['name']}: {count} {first['tokens']:,}; --seq-len {least} cuts both alike.")
        elif other["tokens"] != first["tokens"]:
            lines.append(f"{other['name']}: {count} {first['tokens']:,}: their tokenizers differ.")
    return lines
