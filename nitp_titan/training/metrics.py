"""Training metrics: NTP and NITP losses and geometry beside TorchTitan's own, to the console, files and trackers."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import (
    _get_metrics_rank,
    BaseLogger,
    LoggerContainer,
    MetricsProcessor,
)
from torchtitan.tools.logging import logger

from nitp_titan.geometry.tracker import GeometryTracker
from nitp_titan.objectives.sites import HIDDEN
from nitp_titan.progress import time_left
from nitp_titan.step_files import read_records, STEP_FILES, StepFile

# Our name in metrics.jsonl <- TorchTitan's key.
_RECORD = {
    "ntp_loss": "loss_metrics/ntp_loss",
    "nitp_loss": "loss_metrics/nitp_loss",
    "loss": "loss_metrics/global_avg_loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "tokens": "n_tokens_seen",
    "tokens_per_second": "throughput(tokens_per_second)",
    "seconds_per_step": "time_metrics/seconds_per_step",
    "memory_gib": "memory/max_reserved(GiB)",
    "effective_rank": f"geometry/{HIDDEN}/effective_rank",
    "cosine": f"geometry/{HIDDEN}/cosine",
}
_VALIDATION = {"ntp_loss": "validation_metrics/loss"}
_SKIPPED_VALIDATION = "validation_metrics/skipped"
# Files with a line per validation.
_OF_VALIDATION = ("validation", "validation_geometry")

# The paper's Figure 1 and Figure 5 as one page of TensorBoard's custom scalars.
_TENSORBOARD_LAYOUT = {
    "NITP": {
        "Figure 1: effective rank": ["Multiline", [_RECORD["effective_rank"]]],
        "Figure 1: average cosine similarity": ["Multiline", [f"geometry/{HIDDEN}/cosine_sampled", _RECORD["cosine"]]],
        "Figure 5: NITP loss": ["Multiline", [_RECORD["nitp_loss"]]],
        "NTP loss": ["Multiline", [_RECORD["ntp_loss"], _VALIDATION["ntp_loss"]]],
    }
}


class NITPMetrics(MetricsProcessor):
    """TorchTitan's metrics plus ntp_loss and nitp_loss, metrics.jsonl and a line with the time left."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        run_name: str | None = None
        """Name of the run in Weights & Biases; by default the recipe's. The variable WANDB_RUN_NAME goes first."""

        run_group: str | None = None
        """Group of runs to compare there; by default model family and flavor. WANDB_RUN_GROUP goes first."""

    def __init__(self, config: Config, *, dump_folder: str, parallel_dims, **kwargs):
        for variable, value in (("WANDB_RUN_NAME", config.run_name), ("WANDB_RUN_GROUP", config.run_group)):
            if config.enable_wandb and value is not None:
                # The only way to TorchTitan's logger.
                os.environ.setdefault(variable, value)
        if kwargs.get("pp_schedule") == "DualPipeV":
            # Its last stage is on rank 0 too, which TorchTitan knows of the other V-shaped schedule only.
            kwargs["pp_schedule"] = "ZBVZeroBubble"
        self.rank = _get_metrics_rank(parallel_dims=parallel_dims, pp_schedule=kwargs.get("pp_schedule", "1F1B"))
        """The one that writes."""
        super().__init__(config, dump_folder=dump_folder, parallel_dims=parallel_dims, **kwargs)
        self.last_step = kwargs["config_dict"]["training"]["steps"]
        self.global_losses: Callable[[], Tensor] | None = None
        self.tracker: GeometryTracker | None = None
        self.files: list[StepFile] = []
        self._begun = False
        self.console: ConsoleLogger | None = None
        self.num_skipped = 0
        """Steps that the run has left out; known to the rank that writes."""
        if torch.distributed.get_rank() == self.rank:
            self._add_local_loggers(Path(dump_folder))

    def _build_metric_logger(self, *, config: Config, dump_folder: str, **kwargs: Any) -> BaseLogger:
        """As upstream, with TensorBoard's files of all starts in one folder, where no step is shown twice."""
        others = dataclasses.replace(config, enable_tensorboard=False)
        built = super()._build_metric_logger(config=others, dump_folder=dump_folder, **kwargs)
        self.tensorboard: TensorBoard | None = None
        rank = torch.distributed.get_rank()
        if not config.enable_tensorboard or not (config.save_for_all_ranks or rank == self.rank):
            return built
        folder = Path(dump_folder) / config.save_tb_folder
        self.tensorboard = TensorBoard(folder / f"rank_{rank}" if config.save_for_all_ranks else folder)
        container = LoggerContainer()
        for each in (built, self.tensorboard):
            container.add_logger(each)
        return container

    def _add_local_loggers(self, folder: Path) -> None:
        self.files = [StepFile(folder / f"{name}.jsonl") for name in STEP_FILES]
        metrics_file, self.validation_file, self.geometry_file, self.validation_geometry_file, self.skipped_file = (
            self.files
        )
        training, validation = RecordLogger(metrics_file, _RECORD), RecordLogger(self.validation_file, _VALIDATION)
        container = LoggerContainer()
        container.add_logger(self.logger)
        self.console = ConsoleLogger(self.last_step)
        for local_logger in (training, validation, self.console):
            container.add_logger(local_logger)
        self.logger = container

    def resume(self, step: int, last_validation: int) -> None:
        """Continue the metrics files after ``step``, the step that a checkpoint restored.

        Args:
            last_validation: step up to which validations are kept; a later one will be done again.
        """
        self._begun = True
        if self.tensorboard is not None:
            self.tensorboard.resume(step)
        for file in self.files:
            file.resume(last_validation if file.path.stem in _OF_VALIDATION else step)
        if self.console is not None and self.skipped_file.path.exists():
            self.num_skipped = len(read_records(self.skipped_file.path))

    def should_log(self, step: int) -> bool:
        """Steps of `[metrics] log_freq`, those whose geometry is measured and the last one."""
        measured = self.tracker is not None and self.tracker.due(step)
        return super().should_log(step) or measured or step == self.last_step

    def has_validated(self, step: int) -> bool:
        """Whether a step's validation, with its geometry, is in the files; False on ranks that write none."""
        files = [self.validation_file] if self.console is not None else []
        if files and self.tracker is not None and self.tracker.settings.validation_batches:
            files.append(self.validation_geometry_file)
        return bool(files) and all(
            file.path.exists()
            and any(record["step"] == step and "skipped" not in record for record in read_records(file.path))
            for file in files
        )

    def log_skipped(self, step: int, reason: str) -> None:
        """Record that a step was left out, and why; its other metrics are not logged."""
        if not self._begun:
            self.resume(0, last_validation=0)
        if self.console is not None:
            self.skipped_file.append({"step": step, "reason": reason})
            self.num_skipped += 1
            logger.warning(reason)

    def log_skipped_validation(self, step: int, reason: str) -> None:
        """Record that a validation was left out, and why."""
        # As after a validation: this time is not part of training's speed.
        self.ntokens_since_last_log, self.time_last_log = 0, time.perf_counter()
        if self.console is not None:
            self.validation_file.append({"step": step, "skipped": reason})
            self.logger.log({_SKIPPED_VALIDATION: 1}, step)
            logger.warning(f"step {step}: the validation is left out, training continues. {reason}")

    def log_validation_geometry(self, step: int, stats: dict[str, dict[str, Any]]) -> None:
        """Log the geometry of the fixed validation batches, measured at a step."""
        if self.console is not None and stats:
            self.validation_geometry_file.append({"step": step, **stats})
            self.logger.log(_scalars("validation_geometry", stats), step)
            if hidden := stats.get(HIDDEN):
                logger.info(
                    f"validation step {step}  erank {hidden['effective_rank']:.2f}  cos {hidden['cosine']:z.4f}"
                )

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """As `MetricsProcessor.log`; a collective, called by every rank at the same steps."""
        if not self._begun:
            # Whatever the files hold was logged by a start that came to no checkpoint: all of it runs again.
            self.resume(0, last_validation=0)
        extra = dict(extra_metrics or {})
        extra["loss_metrics/ntp_loss"] = global_avg_loss
        if self.global_losses is not None:
            # The one host synchronisation of the NITP metrics, on logged steps only.
            ntp, nitp = self.global_losses().tolist()
            extra["loss_metrics/ntp_loss"], extra["loss_metrics/nitp_loss"] = ntp, nitp
        if self.tracker is not None and self.tracker.active:
            stats = self.tracker.reduce(self.rank)
            if stats:
                self.geometry_file.append({"step": step, **stats})
                extra |= _scalars("geometry", stats)
        learning_rates = [value for key, value in extra.items() if key.startswith("lr/")]
        if learning_rates:
            extra["lr"] = learning_rates[0]
        elapsed = time.perf_counter() - self.time_last_log
        replicas = self.parallel_dims.world_size / self.parallel_dims.non_data_parallel_size
        tokens_per_second = self.ntokens_since_last_log * replicas / elapsed
        extra["throughput(tokens_per_second)"] = tokens_per_second
        # TorchTitan divides by the log interval, which step 1 and steps after a validation fall short of.
        extra["time_metrics/seconds_per_step"] = extra["n_tokens_seen"] / step / tokens_per_second
        # TorchTitan's own line has no room for the two losses; ours takes its place.
        with _quiet(logger):
            super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=extra)
        if self.console is not None:
            logger.info(self.console.line)


def _scalars(group: str, stats: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Statistics by state as tags of trackers, without the spectra."""
    return {
        f"{group}/{state}/{name}": value
        for state, values in stats.items()
        for name, value in values.items()
        if name != "spectrum"
    }


@contextmanager
def _quiet(log: logging.Logger) -> Iterator[None]:
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


class TensorBoard(BaseLogger):
    """TensorBoard's files of a run, each step once: TensorBoard forgets what an earlier start wrote of later steps.

    TorchTitan's logger has a folder per minute, so that steps which run again after a kill are shown twice.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def resume(self, step: int) -> None:
        """Begin a file after ``step``."""
        self.close()
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        self.writer.add_custom_scalars(_TENSORBOARD_LAYOUT)
        logger.info(f"TensorBoard logging enabled. Logs will be saved at {self.folder}")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if self.writer is None:
            self.resume(0)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        # A kill takes what is not on the disk, and the steps before a checkpoint do not run again.
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class RecordLogger(BaseLogger):
    """Writes the stats of a step to a `StepFile` under our names.

    Args:
        file: where to.
        names: our name of a statistic <- TorchTitan's metric key. Metrics without the first
            key are not of this file and are passed over.
    """

    def __init__(self, file: StepFile, names: dict[str, str]):
        self.file, self.names = file, names

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if next(iter(self.names.values())) in metrics:
            stats = {ours: metrics[key] for ours, key in self.names.items() if key in metrics}
            self.file.append({"step": step, **stats})

    def close(self) -> None:
        self.file.close()


class ConsoleLogger(BaseLogger):
    """Composes the step's line: losses, gradient norm, learning rate, tokens, speed, memory, time left."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self.line = ""

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if "loss_metrics/ntp_loss" not in metrics:
            return
        nitp = metrics.get("loss_metrics/nitp_loss")
        rank, cosine = metrics.get(_RECORD["effective_rank"]), metrics.get(_RECORD["cosine"])
        seconds_left = (self.num_steps - step) * metrics["time_metrics/seconds_per_step"]
        parts = [
            f"step {step}/{self.num_steps}",
            f"loss {metrics['loss_metrics/global_avg_loss']:.4f}",
            f"ntp {metrics['loss_metrics/ntp_loss']:.4f}",
            f"nitp {nitp:.4f}" if nitp is not None else "",
            f"erank {rank:.2f}  cos {cosine:z.4f}" if rank is not None else "",
            f"grad_norm {metrics['grad_norm']:.3f}",
            f"lr {metrics.get('lr', float('nan')):.2e}",
            f"tokens {int(metrics['n_tokens_seen']):,}",
            f"{metrics['throughput(tokens_per_second)']:,.0f} tok/s",
            f"mem {metrics['memory/max_reserved(GiB)']:.2f} GiB",
            f"left {time_left(seconds_left)}",
        ]
        self.line = "  ".join(part for part in parts if part)
