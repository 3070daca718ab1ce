"""Which parameters the optimizer leaves alone, and whose settings it trains with after a resume."""

import dataclasses
import shutil

import pytest
import torch
from helpers import local, make_config, parameters, saved_run
from processes import warm_ranks
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.components.optimizer import default_adamw, OptimizersContainer, ParamGroupConfig

from nitp_titan.checkpoint import safe_dcp
from nitp_titan.checkpoint.optimizer_states import leave_out
from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.errors import UserError

STEPS, START_STEP = 5, 2
DECAY = default_adamw(lr=2e-3, weight_decay=5.0)


def _train_to(folder, last: int, **nitp):
    """Go on with the run in a folder up to a step; weights and optimizer states after each of its steps."""
    config = make_config(
        folder,
        training={"steps": last},
        lr_scheduler={"total_steps": STEPS},
        optimizer=DECAY,
        nitp={"weight": 20.0, "start_step": START_STEP, **nitp},
        checkpoint={"enable": True, "interval": 1, "last_save_model_only": False, "keep_latest_k": 0},
        resume=True,
    )
    trainer = config.build()
    trainer.checkpointer.load(step=-1)
    batches, seen = trainer.batch_generator(trainer.dataloader), {trainer.step: _state(trainer)}
    for step in range(trainer.step + 1, last + 1):
        trainer.step = step
        trainer.train_step(batches)
        trainer.checkpointer.save(step, last_step=step == last)
        seen[step] = _state(trainer)
    trainer.close()
    return seen


def _state(trainer) -> dict[str, torch.Tensor]:
    states = {name: value for name, value in trainer.optimizers.state_dict().items() if name.startswith("state.")}
    return parameters(trainer) | {name: local(value).clone() for name, value in states.items()}


def _of_projector(state: dict[str, torch.Tensor], ending: str = "") -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "nitp.projector" in name and name.endswith(ending)}


@pytest.fixture(scope="module")
def late(assets, tmp_path_factory):
    return _train_to(tmp_path_factory.mktemp("late"), STEPS)


def test_before_the_start_step_the_projector_and_its_states_stay_as_they_are(late):
    initial = _of_projector(late[0])
    assert len(initial) == 3 * 4
    for step in range(1, START_STEP + 1):
        assert all(torch.equal(value, initial[name]) for name, value in _of_projector(late[step]).items()), step
    assert all(value == 0 for value in _of_projector(late[START_STEP], ".step").values())
    others = [name for name in late[0] if "nitp." not in name and name.endswith("weight")]
    assert all(not torch.equal(late[0][name], late[1][name]) for name in others)


def test_the_projector_s_first_trained_step_is_adam_s_first(late):
    trained = late[START_STEP + 1]
    assert [value.item() for value in _of_projector(trained, ".step").values()] == [1, 1, 1]
    assert all(value == START_STEP + 1 for name, value in trained.items() if name.endswith("norm.weight.step"))
    # Adam's first step is as long as the learning rate, whatever the gradient; decay comes before it.
    for name in _of_projector(trained, "1.weight"):
        if not name.startswith("state."):
            moved = trained[name] - late[0][name] * (1 - 2e-3 * 5.0)
            assert moved.abs().median().item() == pytest.approx(2e-3, rel=1e-3)


def test_a_resume_before_at_and_after_the_start_step_is_bit_identical(late, tmp_path):
    for last in (START_STEP - 1, START_STEP, START_STEP + 1, STEPS):
        seen = _train_to(tmp_path, last)
        assert all(torch.equal(value, late[last][name]) for name, value in seen[last].items()), last


def test_two_ranks_leave_the_projector_alone_before_the_start_step_and_across_a_resume(assets, tmp_path):
    arguments = (
        *("-m", "nitp_titan.train", "--recipe", "debug/nitp_debug", "--nitp.weight", "20", "--nitp.start_step", "2"),
        *("--training.steps", "4", "--training.local_batch_size", "2", "--training.global_batch_size", "4"),
        *("--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "0", "--validator.no-enable"),
        *("--optimizer.weight_decay", "5", "--training.seq_len", "256", "--geometry.no-enable"),
    )

    def trained(run):
        done = warm_ranks(2, *arguments, "--dump_folder", str(run))
        assert done.returncode == 0, done.stderr[-3000:]
        return {step: _saved(run / f"checkpoint/step-{step}") for step in (1, 2, 3, 4)}

    whole = trained(tmp_path / "whole")
    first, second, third = (_of_projector(whole[step]) for step in (1, 2, 3))
    assert len(first) == 3 * 4 and all(torch.equal(first[name], second[name]) for name in first)
    assert all(value == 0 for name, value in second.items() if name.endswith(".step"))
    assert all(value == 1 for name, value in third.items() if name.endswith(".step"))
    assert all(not torch.equal(second[name], third[name]) for name in first)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"resumed/checkpoint/step-{step}")
    resumed = trained(tmp_path / "resumed")
    for step in (3, 4):
        assert all(torch.equal(value, whole[step][name]) for name, value in resumed[step].items()), step


def _saved(step) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of a checkpoint."""
    metadata, weights = FileSystemReader(step).read_metadata().state_dict_metadata, Checkpoint(step).tensors
    names = [name for name in metadata if name in weights or name.startswith("optimizer.state.")]
    loaded = {name: torch.empty(metadata[name].size, dtype=metadata[name].properties.dtype) for name in names}
    safe_dcp.load(loaded, step, no_dist=True)
    return loaded


def test_an_optimizer_that_cannot_leave_out_a_parameter_is_refused(assets):
    model = nn.Linear(2, 2)
    optimizers = OptimizersContainer(default_adamw(), model_parts=[model])
    optimizers.optimizers = [torch.optim.SGD([model.weight])]
    with pytest.raises(UserError, match=r"^\[nitp\] start_step needs Adam or AdamW for the projector: SGD cannot"):
        leave_out(optimizers, [model.weight], when=lambda: True)
    leave_out(optimizers, [model.bias], when=lambda: True)


def _grouped(**norms) -> OptimizersContainer.Config:
    """AdamW with other settings for the norms."""
    (rest,) = default_adamw(lr=1e-3).param_groups
    group = ParamGroupConfig(
        pattern="norm", optimizer_name="AdamW", optimizer_kwargs={**rest.optimizer_kwargs, "weight_decay": 0.0, **norms}
    )
    return OptimizersContainer.Config(param_groups=[group, rest], implementation="foreach")


ONE, TWO = {"optimizer": default_adamw(lr=1e-3)}, {"optimizer": _grouped()}
# Before and after a resume.
CHANGES = {
    "nothing": (ONE, ONE),
    "everything": (
        ONE,
        {
            "optimizer": default_adamw(lr=3e-3, weight_decay=20.0, betas=(0.5, 0.7), eps=1e-2),
            "lr_scheduler": {"warmup_steps": 100},
        },
    ),
    "one group": (TWO, {"optimizer": _grouped(lr=5e-3, weight_decay=7.0, betas=(0.6, 0.8))}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_step_after_a_resume_is_adamw_s_with_the_settings_that_are_recorded(assets, tmp_path, change):
    old, new = CHANGES[change]
    saved_run(tmp_path, **old)
    config = make_config(tmp_path, **{"training": {"steps": 9}, **new}, resume=True)
    checkpoint = dataclasses.replace(config.checkpoint, enable=True)
    trainer = dataclasses.replace(config, checkpoint=checkpoint).build()
    trainer.checkpointer.load(step=-1)
    assert trainer.step == 3
    before = {name: value.double() for name, value in _state(trainer).items()}
    assert all(value == 3 for name, value in before.items() if name.endswith(".step"))
    trainer.step = 4
    trainer.train_step(trainer.batch_generator(trainer.dataloader))
    schedule = config.lr_scheduler.build(optimizers=[torch.optim.SGD([torch.zeros(1)], lr=1.0)], training_steps=9)
    factor = schedule.schedulers[0].lr_lambdas[0](3)
    for name, gradient in parameters(trainer, gradients=True).items():
        settings = next(
            group.optimizer_kwargs
            for group in config.optimizer.param_groups
            if group.pattern == ".*" or group.pattern in name
        )
        (beta1, beta2), lr = settings["betas"], settings["lr"] * factor
        gradient = gradient.double()
        mean = beta1 * before[f"state.{name}.exp_avg"] + (1 - beta1) * gradient
        square = beta2 * before[f"state.{name}.exp_avg_sq"] + (1 - beta2) * gradient.square()
        update = mean / (1 - beta1**4) / ((square / (1 - beta2**4)).sqrt() + settings["eps"])
        expected = before[name] * (1 - lr * settings["weight_decay"]) - lr * update
        actual = parameters(trainer)[name].double()
        assert (actual - expected).abs().max().item() < 1e-3 * lr, name
    trainer.close()
