"""Tiny Hugging Face models and their stats computed by hand, for the tests of the evaluation."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

MAX_POSITIONS = 512


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread is enough for tiny models; several wait for each other where other processes use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_llama(folder: Path, tokenizer: Path, seed: int) -> Path:
    """A random Llama whose logits differ enough between tokens to tell right from wrong."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def load(folder: Path, batch_size: int = 4):
    """The model as the evaluation has it."""
    from nitp_titan.evaluation.models import LoadedModel
    from nitp_titan.evaluation.pretrained import load_pretrained

    return LoadedModel(str(folder), *load_pretrained(str(folder)), batch_size)


def write_text(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@torch.no_grad()
def log_probs(model, tokens: list[int]) -> Tensor:
    """Log-probability of every token but the first, given all before it."""
    logits_LV = model(input_ids=torch.tensor([tokens])).logits[0, :-1].double()
    return logits_LV.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def nats_by_document(model, documents: list[list[int]], seq_len: int) -> list[float]:
    """Nats of every document's tokens, forwarded alone in the pieces that packing cuts it into."""
    found, place = [], 0
    for tokens in documents:
        nats, start = 0.0, 0
        while start < len(tokens) - 1:
            end = min(len(tokens) - 1, start + seq_len - (place + start) % seq_len)
            nats -= log_probs(model, tokens[start : end + 1]).sum().item()
            start = end
        found.append(nats)
        place += len(tokens) - 1
    return found
