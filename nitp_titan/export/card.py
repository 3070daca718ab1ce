"""The model card of an exported model: what it is, how it was trained, what was measured."""

from pathlib import Path
from typing import Any

from torchtitan.components.optimizer import LRSchedulersContainer

from nitp_titan import markdown
from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.step_files import read_records

CITATION = """\
@inproceedings{nitp2026,
  title     = {{NITP}: Next Implicit Token Prediction for {LLM} Pre-training},
  author    = {Zhang, Xiangdong and Zhang, Debing and Zhang, Shaofeng and Qin, Xiaohan and Cheng, Yu and Yan, Junchi},
  booktitle = {International Conference on Machine Learning},
  year      = {2026},
  note      = {arXiv:2605.24956}
}"""

_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or where the model is on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=32)[0]))"""


def model_card(checkpoint: Checkpoint, config, architecture: str) -> str:
    """Markdown with the hub's header.

    Args:
        config: ``NITPTrainer.Config`` of the run.
        architecture: class of transformers.
    """
    nitp = config.nitp
    name = (config.metrics.run_name or checkpoint.run_folder.name).replace("/", "-")
    objective = "next implicit token prediction (NITP)" if nitp.enabled else "next token prediction (NTP)"
    projector = " The projector of NITP is not part of it: inference is that of any such model." if nitp.enabled else ""
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            f"tags: [nitp-titan, {'nitp' if nitp.enabled else 'ntp'}]",
            "---",
            "",
            f"# {name}",
            "",
            f"A `{architecture}` ({config.model.family} {config.model.flavor}), pre-trained with {objective} by "
            f"nitp-titan and taken at step {checkpoint.step:,} of {config.training.steps:,}.{projector}",
            "",
            "```python",
            _USE,
            "```",
            "",
            "## Training",
            "",
            markdown.table(["setting", "value"], [[k, str(v)] for k, v in _settings(config).items()], "ll"),
            "",
            "## Measured",
            "",
            markdown.table(["measurement", "value"], list(measured(checkpoint).items())),
            "",
            "## Citation",
            "",
            "```bibtex",
            CITATION,
            "```",
            "",
        ]
    )


def _settings(config) -> dict[str, Any]:
    training, nitp = config.training, config.nitp
    settings = {
        "sequence length": training.seq_len,
        "global batch (sequences)": training.global_batch_size,
        "tokens per step": training.global_batch_size * training.seq_len,
        "steps": training.steps,
        "schedule": schedule(config.lr_scheduler, training.steps),
        "seed": config.debug.seed,
    }
    for group in config.optimizer.param_groups:
        kwargs = ", ".join(f"{key} {value}" for key, value in group.optimizer_kwargs.items())
        settings[f"optimizer, parameters {group.pattern}"] = f"{group.optimizer_name}: {kwargs}"
    if nitp.enabled:
        settings |= {f"nitp {key}": getattr(nitp, key) for key in ("weight", "target_layer", "loss", "objective")}
    return settings


def schedule(settings: LRSchedulersContainer.Config, training_steps: int) -> str:
    """The learning-rate schedule in words, with the numbers of steps that TorchTitan makes of its settings."""
    total = training_steps if settings.total_steps is None else settings.total_steps
    warmup = min(settings.warmup_steps, total)
    ratio = 1.0 if settings.decay_ratio is None else settings.decay_ratio
    decay = min(round(ratio * total), total - warmup)
    if decay == 0:
        then = "then constant"
    elif decay == total - warmup:
        then = f"{settings.decay_type} decay over everything after it ({decay:,} steps)"
    else:
        then = f"{settings.decay_type} decay over the last {decay:,} of {total:,} steps"
    end = f" to {settings.min_lr_factor:g} of the rate" if decay and settings.min_lr_factor else ""
    return f"warm-up of {warmup:,} steps, {then}{end}"


def measured(checkpoint: Checkpoint) -> dict[str, Any]:
    """The last value of each kind up to the checkpoint's step, each with its own step; only what the files have."""
    names = {
        ("metrics", "tokens"): "tokens",
        ("metrics", "ntp_loss"): "NTP loss, training batch",
        ("metrics", "nitp_loss"): "NITP loss, training batch",
        ("validation", "ntp_loss"): "NTP loss, validation",
        ("metrics", "effective_rank"): "effective rank of the last hidden states",
        ("metrics", "cosine"): "average cosine of the last hidden states",
    }
    values = {}
    for (file, key), title in names.items():
        record = _last_record(checkpoint.run_folder / f"{file}.jsonl", key, checkpoint.step)
        if record is not None:
            value = record[key]
            shown = f"{value:,}" if isinstance(value, int) else f"{value:z.4f}"
            values[f"{title}, step {record['step']:,}"] = shown
    return values


def _last_record(path: Path, key: str, step: int) -> dict[str, Any] | None:
    records = read_records(path) if path.is_file() else []
    return next((record for record in reversed(records) if record["step"] <= step and key in record), None)
