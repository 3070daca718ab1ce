"""The protocol of an auxiliary objective: all that one brings to next-token prediction.

Suffixes: B batch, L (local) length, D model dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.nn as nn
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torchtitan.distributed.spmd_types import current_spmd_mesh
from torchtitan.protocols.module import Module

from nitp_titan.objectives.settings import NITPConfig


class Observer(Protocol):
    """Looks at hidden states where they arise; the geometry tracker is one."""

    active: bool
    """Whether it takes in states now."""

    def observes(self, passed: Tensor) -> bool:
        """Whether states are taken in that come with these position ids or labels."""

    def observe(self, site: str, x_BLD: Tensor, passed: Tensor, *, start: int = 0) -> None:
        """Take in states of a micro-batch.

        Args:
            site: their name.
            x_BLD: this rank's states, [batch, some of its length, dim].
            passed: the position ids or the labels that came with them.
            start: first local position of a piece of the sequence.
        """


@dataclass
class Microbatch:
    """Inputs of an objective for one micro-batch on this rank."""

    h_BLD: Tensor
    """Hidden states after the final norm, placed as the decoder returns them."""

    labels_BL: Tensor
    """`IGNORE_INDEX` where a position is not trained."""

    captured: Sequence[Tensor]
    """Output of the module's target for the captured states; empty without one."""

    projector: nn.Module
    """Of the objective's module."""

    num_chunks: int
    """Number of chunks in which a pass over the whole sequence needs no more memory than the logits."""

    observer: Observer | None
    """Is shown the objective's ``sites``."""


class MicrobatchTerms(ABC):
    """The terms of one micro-batch on this rank, summed chunk by chunk of the sequence."""

    @abstractmethod
    def sum(self, h_BLD: Tensor, labels_BL: Tensor, chunk: slice) -> Tensor:
        """Sum of the objective's terms over a chunk.

        Args:
            h_BLD: hidden states of the chunk after the final norm, placed as the decoder returns them.
            labels_BL: its labels, local.
            chunk: its local positions.

        Returns:
            Scalar, float32, with the gradient of ``h_BLD``.
        """

    def captured_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Captured states that are trained through the objective too, each with its gradient; after the last chunk."""
        yield from ()


class Objective(ABC):
    """One auxiliary objective: ``weight`` times the mean of its terms is added to the NTP loss (Eq. 4).

    Nothing in it waits for the device, and its tensors stay where they are: CUDA graphs replay the step.

    Args:
        settings: its table.
    """

    sites: tuple[str, ...] = ()
    """Hidden states that it shows an observer, besides those of the decoder."""

    def __init__(self, settings: NITPConfig):
        self.settings = settings

    @abstractmethod
    def module_config(self, dim: int) -> Module.Config:
        """Config of its module in a decoder of model dimension ``dim``: ``projector``, and ``target`` or None.

        The module is called ``nitp``. It is trained and checkpointed with the model, and dropped at export.
        """

    @abstractmethod
    def num_terms(self, positions_BL: Tensor, labels_BL: Tensor) -> Tensor:
        """Number of terms in one micro-batch of whole sequences; scalar, int64."""

    def compile(self, backend: str) -> None:  # noqa: B027  (not abstract: most have nothing to compile)
        """Compile what `[compile]` of the loss is to compile; nothing unless an objective says what."""

    @abstractmethod
    def microbatch(self, batch: Microbatch) -> MicrobatchTerms:
        """Begin a micro-batch; its terms are summed next."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, differentiable; DTensors come from ``spmd_backend = "full_dtensor"`` only."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def context_parallel_group(tensor: Tensor) -> ProcessGroup | None:
    """The ranks that hold the other parts of the sequence; None without context parallelism."""
    mesh = tensor.device_mesh if isinstance(tensor, DTensor) else current_spmd_mesh()
    names = () if mesh is None else mesh.mesh_dim_names or ()
    if "cp" not in names or mesh.size(names.index("cp")) == 1:
        return None
    return mesh.get_group("cp")
