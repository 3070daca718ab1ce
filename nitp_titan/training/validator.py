"""Validation: the same sequences each time and on any number of ranks, with the geometry of the first ones."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import Validator
from torchtitan.tools.logging import logger

from nitp_titan.data.loader import TextDataLoader
from nitp_titan.errors import UserError
from nitp_titan.geometry.tracker import GeometryTracker
from nitp_titan.machine.failures import Away
from nitp_titan.runs.ranks import largest

TABLE = "validator.dataloader"
# Seconds between tries of a source that does not answer, in one validation; about a minute together.
PAUSES = (1, 2, 4, 8, 16, 32)
# States of a rank before the next batch; all ranks do what the largest one asks for.
_ENDED, _FOUND, _AWAY, _STOPPED = range(4)

Batches = tuple[dict[str, Tensor], Tensor]


class ValidationSkipped(Exception):
    """A rank cannot read its part of the validation data now; raised on all ranks alike."""


class ValidationStopped(Exception):
    """A rank was told to stop; raised on all ranks alike."""


class NITPValidator(Validator):
    """TorchTitan's Validator on the same sequences each time, whatever the number of ranks; measures geometry too.

    The sources of the data are opened once. One that does not answer is waited for, then the validation is left out on
    all ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        freq: int = 10
        """Steps between validations; the first and the last step are validated too."""

        steps: int = -1
        """Global batches of each validation, of `[training] global_batch_size` sequences; -1: all the data, which must
        be finite."""

        def __post_init__(self) -> None:
            # Instead of TorchTitan's, which asserts on `steps`; the constraints of `config` have one line for that.
            if self.enable and self.steps == -1 and getattr(self.dataloader, "infinite", False):
                raise UserError(
                    f"[{TABLE}] infinite = true, but [validator] steps = -1 validates all the data, which must end.",
                    table=TABLE,
                    key="infinite",
                )

    def __init__(self, config: Config, **kwargs):
        # TorchTitan warns that ranks may hang at the end of the data; ours agree on it.
        super().__init__(dataclasses.replace(config, steps=1), **kwargs)
        self.config = config
        self.tracker: GeometryTracker | None = None
        self.last_step: int | None = None
        self.num_measured = 0
        self.stopped = False
        """Whether a validation has ended early, since a rank was told to stop; the same on all ranks."""

    def attach(
        self,
        *,
        cpu_group: dist.ProcessGroup | None,
        last_step: int,
        batches_per_step: int,
        tracker: GeometryTracker | None,
        told_to_stop: Callable[[], bool],
    ) -> None:
        """Take in what only the trainer knows.

        Args:
            cpu_group: of all ranks, so that no device waits while a rank waits for its data; None for one rank.
            last_step: of training; it is validated too.
            batches_per_step: batches of a rank that make up its share of a global batch.
            tracker: of geometry; None measures none.
            told_to_stop: whether this rank was told to stop training.
        """
        self.last_step, self.tracker = last_step, tracker
        # `Validator.validate` builds its loader from this.
        self.dl_config = ValidationData(
            self.config.dataloader, cpu_group, self._microbatches_per_batch(), told_to_stop=told_to_stop
        )
        if tracker is not None:
            self.num_measured = tracker.settings.validation_batches * batches_per_step * self._microbatches_per_batch()
        if self.config.steps != -1:
            self.config = dataclasses.replace(self.config, steps=self.config.steps * batches_per_step)

    def should_validate(self, step: int) -> bool:
        """The first step, every ``freq`` and the last one."""
        return super().should_validate(step) or step == self.last_step

    def post_dataloading_process(self, input_dict, labels, model_parts):
        inputs, passed_labels, extra = super().post_dataloading_process(input_dict, labels, model_parts)
        if self.tracker is not None:
            self.tracker.start_microbatch(input_dict["positions"], labels, passed=(extra["positions"], passed_labels))
        return inputs, passed_labels, extra

    def validate(self, model_parts, step: int) -> None:
        """As `Validator.validate`; measures the first batches, the same each time, so that runs can be compared.

        Of a validation that `stopped` nothing is recorded: the run that resumes does it again.
        """
        if self.num_measured:
            self.tracker.start(self.num_measured, seed=self.tracker.settings.seed)
        try:
            super().validate(model_parts, step)
        except (ValidationSkipped, ValidationStopped) as end:
            for model in model_parts:
                model.train()
            if self.num_measured:
                self.tracker.active = False
            if isinstance(end, ValidationSkipped):
                self.metrics_processor.log_skipped_validation(step, str(end))
            else:
                self.stopped = True
            return
        if self.num_measured:
            self.metrics_processor.log_validation_geometry(step, self.tracker.reduce(self.metrics_processor.rank))

    def _microbatches_per_batch(self) -> int:
        if not self.parallel_dims.pp_enabled:
            return 1
        return self.local_batch_size // self.parallelism.pipeline_parallel_microbatch_size


class ValidationData:
    """A rank's batches of the validation data, from their beginning at each iteration; stands in for a loader's config.

    All ranks end after the same batch; one that has no sequence left gets batches without labels.

    Args:
        config: of the data loader.
        group: CPU group of all ranks; None for a run of one rank.
        num_microbatches: batches that are taken together, as many as a pipeline schedule takes.
        told_to_stop: whether this rank was told to stop; asked before each batch.
        pauses: seconds between tries of a source that does not answer.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        config: BaseDataLoader.Config,
        group: dist.ProcessGroup | None,
        num_microbatches: int,
        *,
        told_to_stop: Callable[[], bool] = lambda: False,
        pauses: tuple[float, ...] = PAUSES,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.config, self.group, self.num_microbatches = config, group, num_microbatches
        self.told_to_stop, self.pauses, self.sleep = told_to_stop, pauses, sleep
        self._options: dict[str, Any] = {}
        self._loader: BaseDataLoader | None = None
        self._iterator: Iterator[Batches] | None = None

    def build(self, **options: Any) -> "ValidationData":
        """As a config's ``build``; the loader is built at the first batch, so that its errors are waited for."""
        self._options = options
        return self

    def __iter__(self) -> Iterator[Batches]:
        """
        Raises:
            ValidationSkipped: if a source of any rank does not answer after all pauses.
            ValidationStopped: if any rank was told to stop.
            UserError: if no rank has a batch.
        """
        self._rewind()
        pauses, count = iter(self.pauses), 0
        while True:
            state, batch, reason = self._next(pauses)
            together = largest(state, self.group)
            if together == _STOPPED:
                raise ValidationStopped
            if together == _AWAY:
                raise ValidationSkipped(self._any(reason))
            if together == _ENDED:
                break
            yield batch or self._nothing()
            count += 1
        if count == 0:
            raise UserError(f"[{TABLE}] holds no text.", table=TABLE)
        for _ in range(-count % self.num_microbatches):
            yield self._nothing()

    def _rewind(self) -> None:
        self._iterator = None
        if isinstance(self._loader, TextDataLoader):
            self._loader.rewind()
        else:
            # Only of our own loader it is known how to begin again.
            self._loader = None

    def _next(self, pauses: Iterator[float]) -> tuple[int, Batches | None, str]:
        """State of this rank, its batch, and the reason if it has none."""
        while not self.told_to_stop():
            try:
                if self._iterator is None:
                    self._iterator = iter(self._open())
                batch = next(self._iterator, None)
                return (_ENDED if batch is None else _FOUND), batch, ""
            except Away as error:
                self._iterator = None
                # A data worker puts its traceback before it.
                reason, pause = str(error).strip().splitlines()[-1], next(pauses, None)
                if pause is None:
                    return _AWAY, None, reason
                logger.warning(f"validation waits {pause} s: {reason}")
                self.sleep(pause)
        return _STOPPED, None, ""

    def _open(self) -> BaseDataLoader:
        """The loader, which continues after the last batch that it gave."""
        if self._loader is None:
            table = {"table": TABLE} if isinstance(self.config, TextDataLoader.Config) else {}
            self._loader = self.config.build(**self._options, **table)
        elif isinstance(self._loader, TextDataLoader):
            self._loader.load_state_dict(self._loader.state_dict())
        return self._loader

    def _any(self, reason: str) -> str:
        """The first reason that a rank has; a collective."""
        if self.group is None:
            return reason
        reasons = [""] * dist.get_world_size(self.group)
        dist.all_gather_object(reasons, reason, group=self.group)
        return next(filter(None, reasons))

    def _nothing(self) -> Batches:
        shape = self._options["local_batch_size"], self._options["seq_len"]
        inputs = {
            "input": torch.zeros(shape, dtype=torch.int64),
            "positions": torch.arange(shape[1]).repeat(shape[0], 1),
        }
        return inputs, torch.full(shape, IGNORE_INDEX)
