"""States of TorchTitan's optimizers, and parameters that they leave alone."""

from collections.abc import Callable, Sequence

from torch import nn, Tensor
from torch.optim import Adam
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.optimizer.utils import init_optim_state

from nitp_titan.errors import UserError


def create_states(optimizers: OptimizersContainer) -> None:
    """Give every parameter its state before the first step: zeros, and no step counted.

    torch creates a state at the first update of its parameter, so that a checkpoint from before (of a projector that is
    not trained yet, after steps that were all skipped) would lack it.
    """
    for optimizer in optimizers:
        # A step without gradients and learning rate, which Adam counts.
        init_optim_state(optimizer)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()


def leave_out(optimizers: OptimizersContainer, parameters: Sequence[nn.Parameter], when: Callable[[], bool]) -> None:
    """Keep some parameters and their states as they are in every step of the optimizers at which ``when()`` holds.

    A gradient of zero would not: weight decay shrinks the parameter and Adam counts the step. The gradients are put
    back after the step, since a CUDA graph keeps writing to them.

    Raises:
        UserError: if an optimizer that cannot leave out a parameter holds one of them.
    """
    wanted = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        held = any(id(parameter) in wanted for group in optimizer.param_groups for parameter in group["params"])
        if held and not isinstance(optimizer, Adam):
            raise UserError(
                f"[nitp] start_step needs Adam or AdamW for the projector: {type(optimizer).__name__} cannot leave out "
                "a parameter.",
                table="nitp",
                key="start_step",
            )
    gradients: list[Tensor | None] = []

    def take(*_) -> None:
        if when():
            for parameter in parameters:
                gradients.append(parameter.grad)
                parameter.grad = None

    def give_back(*_) -> None:
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        gradients.clear()

    optimizers.register_step_pre_hook(take)
    optimizers.register_step_post_hook(give_back)


def settings(optimizers: OptimizersContainer) -> list[list[dict]]:
    """A copy of the settings of all parameter groups, by optimizer."""
    return [[dict(group) for group in optimizer.param_groups] for optimizer in optimizers]


def restore_settings(
    optimizers: OptimizersContainer, saved: list[list[dict]], schedulers: LRSchedulersContainer
) -> None:
    """Put back the settings that a checkpoint has overwritten, with the schedule's learning rate at its own step."""
    for optimizer, groups in zip(optimizers, saved):
        for group, wanted in zip(optimizer.param_groups, groups):
            group.update(wanted)
    for scheduler in schedulers:
        for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr()):
            group["lr"] = lr
