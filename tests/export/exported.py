"""Exported models as transformers loads them, and the training model beside them."""

import json
from pathlib import Path

import torch
from helpers import export_of
from processes import PROJECT

# Longer than GPT-OSS's sliding window of 128.
LENGTH = 192
TRAINING = {"seq_len": LENGTH, "local_batch_size": 2, "global_batch_size": 2, "steps": 3, "max_norm": 1e9}


def export(folder: Path, out: Path, **options) -> Path:
    export_of(folder, **options).write(out)
    return out


def load(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers.models.")
    return model.eval()


def real_text(tokenizer) -> torch.Tensor:
    """Token ids of a document, [1, LENGTH]."""
    document = json.loads((PROJECT / "assets/stdlib/validation.jsonl").read_text().splitlines()[0])
    return torch.tensor([tokenizer.encode(document["text"], add_bos=True, add_eos=False)[:LENGTH]])


@torch.no_grad()
def training_logits(trainer, ids: torch.Tensor) -> torch.Tensor:
    (model,) = trainer.model_parts
    model.eval()._skip_lm_head = False
    positions = torch.arange(ids.shape[1])[None]
    return model(ids, positions=positions, attention_masks=model.get_attention_masks(positions))
