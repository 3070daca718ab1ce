"""Cross-entropy, perplexity and bits per byte of a text, packed exactly as in training.

The model folder's tokenizer is read as TorchTitan reads it, `TextDataLoader` packs the documents, positions restart
with every document and attention does not cross documents. The last sequence is filled up with what has no label, so
that every document is there wholly and bits per byte are exact.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX
from tqdm import tqdm

from nitp_titan.data.hub import hub_token
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.text_files import documents_of, kind_of
from nitp_titan.data.tokenizer import load_tokenizer, TextTokenizer, UnfitTokenizer
from nitp_titan.errors import UserError
from nitp_titan.evaluation.models import LoadedModel, num_positions
from nitp_titan.evaluation.plan import Plan, Row, Task
from nitp_titan.evaluation.pretrained import Model
from nitp_titan.evaluation.scores import ratio, Score
from nitp_titan.files import sha256

# The paper's context: what longer ones add is little, and a batch's logits would need more memory.
LONGEST_DEFAULT = 8192
# Logits in float32 of this many tokens at a time.
_ROWS = 1024


def plan(text: Path, field: str, seq_len: int | None, models: Sequence[Model]) -> Plan:
    """The task of a text, for models that all see the same sequence length.

    Args:
        text: a file of JSON lines, parquet or plain text.
        field: field of a document that holds its text.
        seq_len: tokens per sequence; by default the smallest of the models' ``max_position_embeddings``, at most 8192.

    Raises:
        UserError: if a document of the text cannot be read, or ``seq_len`` is too small or too large.
    """
    # All of it: nothing of a text that is found bad later would be of use.
    count = sum(1 for _ in documents_of(text, field))
    if not count:
        raise UserError(f"--text {text} holds no document.")
    limits = {model.name: num_positions(model.source) for model in models}
    if seq_len is None:
        seq_len = min([LONGEST_DEFAULT, *(limit for limit in limits.values() if limit)])
        rule = f"the smallest max_position_embeddings of the models, at most {LONGEST_DEFAULT}"
    else:
        _check_length(seq_len, limits)
        rule = "--seq-len"
    settings = {"sha256": sha256(text), "field": field, "seq_len": seq_len, "transformers": version("transformers")}
    name = f"text-{text.stem}"
    rows = [
        Row("text", text.name, metric, f"packed in {seq_len}", (name,))
        for metric in ("cross_entropy", "perplexity", "bits_per_byte")
    ]
    note = (
        f"{text} ({count:,} document{'s' * (count != 1)}) is packed in sequences of {seq_len} tokens ({rule}); "
        "cross-entropy in nats per token, end of document included; standard errors are over documents."
    )
    return Plan([Task(name, settings, partial(measure, text, field, seq_len))], rows, notes=[note])


def _check_length(seq_len: int, limits: dict[str, int | None]) -> None:
    if seq_len < 2:
        raise UserError(f"--seq-len {seq_len}: at least 2.")
    for name, limit in limits.items():
        if limit and seq_len > limit:
            raise UserError(f"--seq-len {seq_len}: at most {limit}, the max_position_embeddings of {name}.")


def _source(text: Path, field: str) -> TextDataLoader.Config:
    # Each model reads it once.
    source = {"dataset": kind_of(text), "dataset_path": str(text), "text_field": field, "streaming": True}
    return TextDataLoader.Config(**source, infinite=False)


class RecordingTokenizer(TextTokenizer):
    """The training tokenizer, which records of each document: its predicted tokens and their bytes."""

    def __init__(self, folder: str):
        super().__init__(tokenizer_path=folder)
        self.num_tokens: list[int] = []
        self.num_bytes: list[int] = []
        self.texts, self.tokens = hashlib.sha256(), hashlib.sha256()
        decoder = json.loads(self.tokenizer.to_str()).get("decoder") or {}
        self._is_byte_level = "ByteLevel" in json.dumps(decoder)

    def encode(self, text: str, **kwargs) -> list[int]:
        tokens = super().encode(text, **kwargs)
        size = len(text.encode())
        if tokens and tokens[0] != self.bos_id:
            # Nothing predicts the first token, so its bytes are not paid for.
            size -= min(size, self._first_bytes(text))
        self.num_tokens.append(max(0, len(tokens) - 1))
        self.num_bytes.append(size)
        self.texts.update(repr(text).encode())
        self.tokens.update(repr(tokens).encode())
        return tokens

    def _first_bytes(self, text: str) -> int:
        encoding = self.tokenizer.encode(text)
        if not encoding.tokens:
            return 0
        if self._is_byte_level:
            # Each character of such a vocabulary stands for one byte; a token may end within a character.
            return len(encoding.tokens[0])
        return len(text[: encoding.offsets[0][1]].encode())


@torch.no_grad()
def measure(text: Path, field: str, seq_len: int, loaded: LoadedModel) -> dict[str, Score]:
    """Scores ``cross_entropy`` (nats per token), ``perplexity`` and ``bits_per_byte`` of a text.

    Raises:
        UserError: if the model's tokenizer does not load or does not end a document.
    """
    tokenizer = _tokenizer(loaded.source)
    loader = TextDataLoader(
        _source(text, field),
        dp_world_size=1,
        dp_rank=0,
        tokenizer=tokenizer,
        seq_len=seq_len,
        local_batch_size=loaded.batch_size,
    )
    batches = tqdm(loader, desc=text.name, unit=" batches", mininterval=1.0)
    nats = torch.cat([_nats(loaded.model, *batch) for batch in batches] or [torch.zeros(0)])
    by_document = [float(part.sum()) for part in nats.split(tokenizer.num_tokens)]
    if not sum(tokenizer.num_tokens) or not sum(tokenizer.num_bytes):
        raise UserError(f"--text {text} holds no text.")
    entropy = ratio(
        by_document,
        tokenizer.num_tokens,
        higher_is_better=False,
        documents=tokenizer.texts.hexdigest(),
        scale=f"tokens {tokenizer.tokens.hexdigest()}",
    )
    bits = [nats / math.log(2) for nats in by_document]
    bits_per_byte = ratio(bits, tokenizer.num_bytes, higher_is_better=False, documents=tokenizer.texts.hexdigest())
    return {"cross_entropy": entropy, "perplexity": entropy.exp(), "bits_per_byte": bits_per_byte}


def _tokenizer(source: str) -> RecordingTokenizer:
    folder = source
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt"]
        folder = snapshot_download(source, allow_patterns=patterns, token=hub_token())
    try:
        # For its checks; the other one records.
        load_tokenizer(folder)
    except UnfitTokenizer as error:
        raise UserError(f"{source}{error}") from None
    return RecordingTokenizer(folder)


def _nats(model, inputs: dict[str, Tensor], labels_BL: Tensor) -> Tensor:
    """Nats of every label of a batch, in the order of the text, [batch * length], float64 on the CPU.

    A packed token attends to its own document's part of the sequence. Each part is a row of its own here, padded on the
    right, where causal attention does not look. That holds for every architecture, while only some of transformers keep
    packed documents apart by their positions (GPT-OSS does not).
    """
    labelled_BL = labels_BL != IGNORE_INDEX
    # Without what only fills the last sequences up.
    tokens, labels, positions = (x[labelled_BL] for x in (inputs["input"], labels_BL, inputs["positions"]))
    starts = (positions == 0).nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(tokens)])]
    tokens, labels = tokens.split(lengths), labels.split(lengths)
    nats: list[Tensor] = [torch.empty(0)] * len(lengths)
    for group in _groups(lengths, inputs["input"].numel()):
        found = _nats_of_rows(model, [tokens[index] for index in group], [labels[index] for index in group])
        for index, row in zip(group, found, strict=True):
            nats[index] = row
    return torch.cat(nats)


def _groups(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, which padded to the longest hold at most ``budget`` tokens, or are one row."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if group and lengths[group[0]] * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(index)
    yield group


def _nats_of_rows(model, tokens: list[Tensor], labels: list[Tensor]) -> Sequence[Tensor]:
    tokens_BL = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(model.device)
    logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits
    return [_cross_entropy(row, goal.to(row.device)) for row, goal in zip(logits_BLV, labels, strict=True)]


def _cross_entropy(logits_LV: Tensor, labels_N: Tensor) -> Tensor:
    parts = zip(logits_LV[: len(labels_N)].split(_ROWS), labels_N.split(_ROWS), strict=True)
    losses = [torch.nn.functional.cross_entropy(rows.float(), goal, reduction="none") for rows, goal in parts]
    return torch.cat(losses).double().cpu()
