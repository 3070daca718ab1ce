"""Trainers for tests: the debug recipe on a small generated dataset, all settings by name."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.dataloader import BaseDataLoader

from nitp_titan import config_registry
from nitp_titan.checkpoint.stored import Checkpoint, RESOLVED
from nitp_titan.export.export import Export
from nitp_titan.models import build_model_spec
from nitp_titan.training.trainer import load_config, NITPTrainer

IGNORE = -100


class PackedDataLoader(BaseDataLoader):
    """Packed random documents with ignored labels; sample i is a function of i alone.

    So any number of ranks and accumulation steps sees the same global batches.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        vocab_size: int = 4096
        infinite: bool = True
        """TorchTitan's validator sets it; there is no end either way."""

        documents: str = "packed"
        """Lengths: ``packed`` up to 40, ``single`` tokens, single tokens in the ``first half`` of each sample;
        ``unlike``: even samples are one document, odd ones of single tokens, and from the fifth on without a label."""

    def __init__(self, config, *, dp_world_size, dp_rank, seq_len, local_batch_size, **kwargs):
        self.config, self.ranks, self.rank = config, dp_world_size, dp_rank
        self.seq_len, self.batch_size, self.drawn = seq_len, local_batch_size, 0

    def sample(self, index: int):
        generator = torch.Generator().manual_seed(1000 + index)
        # Squares of uniform numbers: few tokens are common, so that there is something to learn.
        tokens = (torch.rand(self.seq_len + 1, generator=generator) ** 4 * self.config.vocab_size).long()
        labels = tokens[1:].clone()
        labels[torch.rand(self.seq_len, generator=generator) < 0.1] = IGNORE
        if self.config.documents == "unlike" and index % 2 and index >= 4:
            labels[:] = IGNORE
        return tokens[:-1], self.positions(index, generator), labels

    def positions(self, index: int, generator: torch.Generator) -> torch.Tensor:
        kind, length = self.config.documents, self.seq_len
        if kind == "unlike" and index % 2 == 0:
            return torch.arange(length)
        if kind == "single" or (kind == "unlike" and index < 4):
            return torch.zeros(length, dtype=torch.int64)
        positions: list[int] = [0] * (length // 2) if kind == "first half" else []
        while len(positions) < length:
            positions += range(int(torch.randint(1, 40, (1,), generator=generator)))
        return torch.tensor(positions[:length])

    def __iter__(self):
        while True:
            indices = range(self.drawn, self.drawn + self.batch_size)
            self.drawn += self.batch_size
            inputs, positions, labels = map(
                torch.stack, zip(*(self.sample(i * self.ranks + self.rank) for i in indices))
            )
            yield {"input": inputs, "positions": positions}, labels

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


def make_config(
    folder: Path,
    *,
    recipe: str = "debug/nitp_debug",
    train_config: str = "cpu",
    generated_data: bool = True,
    documents: str = "packed",
    **sections,
):
    """The debug recipe with changes by section, for example ``nitp={"loss": "mse"}``, or whole sections."""
    config = config_registry.load(f"{recipe}@{train_config}")
    defaults = {
        # Without clipping, or the gradients of one part would depend on all others.
        "training": {"seq_len": 128, "local_batch_size": 4, "global_batch_size": 4, "steps": 3, "max_norm": 1e9},
        "metrics": {"log_freq": 1},
        "checkpoint": {"enable": False},
        "lr_scheduler": {"warmup_steps": 1},
        "geometry": {"enable": False, "layers": False},
    }
    changes = {"dump_folder": str(folder)}
    if generated_data:
        changes["dataloader"] = PackedDataLoader.Config(documents=documents)
        changes["validator"] = dataclasses.replace(config.validator, enable=False)
    for section in {*defaults, *sections}:
        values = sections.get(section, {})
        if isinstance(values, dict):
            values = dataclasses.replace(getattr(config, section), **{**defaults.get(section, {}), **values})
        changes[section] = values
    if "model" in sections:
        changes["model_spec"] = build_model_spec(changes["model"])
    return dataclasses.replace(config, **changes)


def train(config) -> NITPTrainer:
    """Build and take the steps, without checkpoints; the trainer keeps the last step's gradients."""
    trainer = config.build()
    batches = trainer.batch_generator(trainer.dataloader)
    for step in range(1, config.training.steps + 1):
        trainer.step = step
        trainer.train_step(batches)
    trainer.close()
    return trainer


def saved_run(folder: Path, *, change=None, **settings) -> NITPTrainer:
    """A run of three steps with a checkpoint after the second and the third; its trainer, closed.

    Args:
        change: takes the trainer before it saves the last checkpoint.
        settings: as in `make_config`.
    """
    config = make_config(folder, **settings)
    checkpoint = dataclasses.replace(config.checkpoint, enable=True, interval=2, last_save_model_only=False)
    trainer = dataclasses.replace(config, checkpoint=checkpoint).build()
    trainer.checkpointer.load(step=-1)
    batches = trainer.batch_generator(trainer.dataloader)
    for step in range(trainer.step + 1, config.training.steps + 1):
        trainer.step = step
        trainer.train_step(batches)
        if step == config.training.steps and change is not None:
            change(trainer)
        trainer.checkpointer.save(step, last_step=step == config.training.steps)
    trainer.close()
    return trainer


def with_expert_bias(trainer: NITPTrainer, scale: float = 0.3) -> None:
    """Give every expert a selection bias between 0 and ``scale``, as long training does."""
    generator = torch.Generator().manual_seed(0)
    for name, buffer in trainer.model_parts[0].named_buffers():
        if name.endswith("expert_bias_E"):
            buffer.copy_(scale * torch.rand(buffer.shape, generator=generator))


def without_expert_bias(trainer: NITPTrainer) -> None:
    """As without load balancing, for models whose class in transformers has no such bias."""
    with_expert_bias(trainer, scale=0.0)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parameters(trainer, *, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Full copies of all parameters, or of their gradients, by name."""
    named = [item for part in trainer.model_parts for item in part.named_parameters()]
    return {
        name: local(p.grad if gradients else p).detach().clone()
        for name, p in named
        if not gradients or p.grad is not None
    }


def gradient_norms(trainer) -> dict[str, float]:
    """float64 norms of the projector's and of all other gradients, over all pipeline stages."""
    squares = torch.zeros(2, dtype=torch.float64)
    for name, gradient in parameters(trainer, gradients=True).items():
        squares[0 if name.startswith("nitp.") else 1] += gradient.double().square().sum().cpu()
    _sum_over_stages(trainer, squares)
    return dict(zip(("projector", "rest"), squares.sqrt().tolist()))


def weight_norm(trainer) -> float:
    """float64 norm of all parameters, over all pipeline stages."""
    square = torch.zeros(1, dtype=torch.float64)
    for value in parameters(trainer).values():
        square += value.double().square().sum().cpu()
    _sum_over_stages(trainer, square)
    return square.sqrt().item()


def _sum_over_stages(trainer, values: torch.Tensor) -> None:
    if trainer.parallel_dims.pp_enabled:
        torch.distributed.all_reduce(values, group=trainer.parallel_dims.get_mesh("pp").get_group())


def export_of(folder: Path, **options) -> Export:
    """The export of a run, or of a step's folder in one."""
    checkpoint = Checkpoint(folder)
    return Export(checkpoint, load_config(checkpoint.run_folder / RESOLVED, None), **options)
