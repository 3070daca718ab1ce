"""NITPTrainer: TorchTitan's Trainer with an auxiliary objective, its exact counts, and what a run needs around them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import tyro
from torch import Tensor
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from nitp_titan.checkpoint.manager import NITPCheckpointManager
from nitp_titan.checkpoint.optimizer_states import create_states, leave_out
from nitp_titan.config.build import build_trainer_config
from nitp_titan.config.constraints import check_constraints
from nitp_titan.config.recipe import read_settings
from nitp_titan.config.refusals import upstream_refusals
from nitp_titan.config.sections import Float8Config, MachineConfig
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.errors import UserError
from nitp_titan.geometry.settings import GeometryConfig
from nitp_titan.geometry.tracker import GeometryTracker, measured_sites
from nitp_titan.machine import credentials
from nitp_titan.models.settings import ModelConfig
from nitp_titan.objectives.nitp import find_distance
from nitp_titan.objectives.settings import NITPConfig
from nitp_titan.runs import ranks
from nitp_titan.runs.preflight import Plan, preflight
from nitp_titan.training.bad_steps import BadSteps, BadStepsConfig, StepSkipped
from nitp_titan.training.lr_scheduler import WSDSchedulers
from nitp_titan.training.metrics import NITPMetrics
from nitp_titan.training.preemption import ends_with_others, EXIT_PREEMPTED, PreemptionSignal
from nitp_titan.training.validator import NITPValidator


def load_config(recipe: Path, train_config: Path | None) -> "NITPTrainer.Config":
    """The config of a recipe on a train config; of a ``resolved.toml`` alone.

    Raises:
        UserError: naming file, table, key, value and what is allowed.
    """
    return build_trainer_config(read_settings(recipe, train_config), NITPTrainer.Config)


class NITPTrainer(Trainer):
    """Trains NTP alone (weight 0: TorchTitan's own path) or NTP plus an auxiliary objective.

    Args:
        plan: from `preflight`, which ``Config.build`` calls.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """``model_spec`` and ``loss`` are those of NTP; `preflight` adds the objective."""

        model: Annotated[ModelConfig, tyro.conf.Suppress] = field(default_factory=ModelConfig)
        nitp: NITPConfig = field(default_factory=NITPConfig)
        geometry: GeometryConfig = field(default_factory=GeometryConfig)
        bad_steps: BadStepsConfig = field(default_factory=BadStepsConfig)
        float8: Float8Config = field(default_factory=Float8Config)
        lr_scheduler: WSDSchedulers.Config = field(default_factory=WSDSchedulers.Config)
        metrics: NITPMetrics.Config = field(default_factory=NITPMetrics.Config)
        validator: NITPValidator.Config = field(default_factory=NITPValidator.Config)
        checkpoint: NITPCheckpointManager.Config = field(default_factory=NITPCheckpointManager.Config)
        machine: MachineConfig = field(default_factory=MachineConfig)
        resume: bool = False
        """Resume the run in dump_folder although its recipe or data have changed, for example for more steps."""

        overwrite: bool = False
        """Start anew in dump_folder; the run that is there is kept beside it, as <dump_folder>.1, .2, ..."""

        def __post_init__(self) -> None:
            Trainer.Config.__post_init__(self)
            credentials.check_settings(self)
            check_constraints(self)
            if self.model_spec is not None:
                self.nitp.check_model(len(self.model_spec.model.layers), self.model_spec.model.dim)
            find_distance(self.nitp.loss)
            self.nitp.check_parallelism(self.parallelism)
            for table, enabled in (("nitp", self.nitp.enabled), ("geometry", self.geometry.enable)):
                if enabled and not isinstance(self.loss, ChunkedLossWrapper.Config):
                    raise UserError(f"[{table}] needs TorchTitan's ChunkedLossWrapper as loss.", table=table)

        def build(self) -> "NITPTrainer":
            """Check and decide all that can be known before a trainer exists, then build it."""
            return NITPTrainer(preflight(self))

    def __init__(self, plan: Plan):
        with upstream_refusals():
            super().__init__(plan.config)
        self.plan = plan
        # So that no device waits while ranks agree on a stop or on the end of the data, in training and validation.
        self.cpu_group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self.stop = PreemptionSignal(self.cpu_group)
        self.stopped = self._validates_again = False
        if not self.config.checkpoint.create_seed_checkpoint:
            create_states(self.optimizers)
        # TorchTitan's constructor builds the parts; here they learn of each other, all in one place.
        if self.config.nitp.enabled:
            self._attach_objective()
        self.tracker = self._attached_tracker() if self.config.geometry.enable else None
        self.bad_steps = self._attached_bad_steps()
        self._attach_data()
        if dist.get_rank() == 0:
            self._write_start()

    def init_distributed(self) -> ParallelDims:
        """As `Trainer.init_distributed`, in the process group that `preflight` has made."""
        return ParallelDims.from_config(self.config.parallelism, dist.get_world_size())

    @property
    def _num_microbatches(self) -> int:
        """Of a rank, per optimizer step."""
        return self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches

    def _attach_objective(self) -> None:
        has_loss = not self.parallel_dims.pp_enabled or self.pp_has_last_stage
        module = self.model_parts[-1].nitp if has_loss else None
        self.loss_fn.attach(
            module.projector if has_loss else None, num_microbatches=self._num_microbatches, device=self.device
        )
        self.metrics_processor.global_losses = self._global_losses
        if has_loss and self.config.nitp.start_step > 0:
            leave_out(self.optimizers, list(module.parameters()), when=lambda: not self._trains_objective())

    def _trains_objective(self) -> bool:
        return self.step > self.config.nitp.start_step

    def _attached_tracker(self) -> GeometryTracker:
        config = self.config
        tracker = GeometryTracker(
            config.geometry,
            config.nitp,
            sites=measured_sites(config.geometry, config.nitp, len(self.model_config.layers)),
            dim=self.model_config.dim,
            seq_len=config.training.seq_len,
            batch_size=config.training.local_batch_size // self.num_pipeline_parallel_microbatches,
            last_step=config.training.steps,
            parallel_dims=self.parallel_dims,
            parallelism=config.parallelism,
            device=self.device,
        )
        self.loss_fn.observer = self.metrics_processor.tracker = tracker
        for part in self.model_parts:
            part.observer = tracker
        return tracker

    def _attached_bad_steps(self) -> BadSteps:
        loss_mesh, pp_mesh = (self.parallel_dims.get_optional_mesh(axis) for axis in ("loss", "pp"))
        bad_steps = BadSteps(
            self.config.bad_steps,
            model_parts=self.model_parts,
            num_losses=self.gradient_accumulation_steps,
            loss_stats=self.loss_fn.stats if self.config.nitp.enabled else None,
            has_loss=pp_mesh is None or self.pp_has_last_stage,
            num_loss_shares=1 if loss_mesh is None else loss_mesh.size(),
            stage=0 if pp_mesh is None else pp_mesh.get_local_rank(),
            device=self.device,
            metrics=self.metrics_processor,
            last_checkpoint=self.checkpointer.last_checkpoint,
        )
        self.checkpointer.before_save = bad_steps.check_weights
        return bad_steps

    def _attach_data(self) -> None:
        if isinstance(self.dataloader, TextDataLoader):
            self.dataloader.any_rank = lambda found: bool(ranks.largest(found, self.cpu_group))
        if self.config.validator.enable:
            self.validator.attach(
                cpu_group=self.cpu_group,
                last_step=self.config.training.steps,
                batches_per_step=self.gradient_accumulation_steps,
                tracker=self.tracker,
                # After the last step nothing else is left to do.
                told_to_stop=lambda: self.stop.received and self.step < self.config.training.steps,
            )

    def _write_start(self) -> None:
        """Record this start in the run folder, and each checkpoint from now on."""
        resume, documents = self.plan.resume, getattr(self.dataloader, "num_documents", None)
        self.checkpointer.after_save = partial(resume.note_checkpoint, documents=documents)
        world_size = dist.get_world_size()
        resume.write_start(self.plan.recorded, documents=documents, hosts=self.plan.hosts, world_size=world_size)

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """One optimizer step, measured where geometry is due; a bad one is left out or ends training (`BadSteps`)."""
        try:
            self._train_step(data_iterator)
        except StepSkipped:
            self.lr_schedulers.step()
            if self.tracker is not None:
                self.tracker.active = False

    def forward_backward_step(self, **inputs: Any) -> Tensor:
        """As `Trainer.forward_backward_step`; every loss and gradient is shown to `BadSteps`."""
        loss = super().forward_backward_step(**inputs)
        self.bad_steps.observe(self.step, loss)
        return loss

    def _train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        if self.config.nitp.enabled:
            data_iterator = self._counted(data_iterator)
        if self.tracker is None or not self.tracker.due(self.step):
            return super().train_step(data_iterator)
        self.tracker.start(self._num_microbatches, seed=self.config.geometry.seed + self.step)
        with self.without_cuda_graph():
            super().train_step(data_iterator)

    @contextmanager
    def without_cuda_graph(self) -> Iterator[None]:
        """A graph replays the steps that measure nothing; the same kernels measure outside of it."""
        replayed, self.fwd_bwd_fn = self.fwd_bwd_fn, self._forward_backward_body
        try:
            yield
        finally:
            self.fwd_bwd_fn = replayed

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """As `Trainer.post_dataloading_process`."""
        inputs, passed_labels, extra = super().post_dataloading_process(input_dict, labels)
        if self.tracker is not None:
            self.tracker.start_microbatch(input_dict["positions"], labels, passed=(extra["positions"], passed_labels))
        return inputs, passed_labels, extra

    def _counted(
        self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """The micro-batches of a step, after the objective's terms are counted over all ranks."""
        batches = [next(data_iterator) for _ in range(self._num_microbatches)]
        count = self.loss_fn.objective.num_terms
        num_terms = sum(count(inputs["positions"], labels) for inputs, labels in batches).to(self.device)
        if self.parallel_dims.dp_enabled:
            num_terms = dist_utils.dist_sum_tensor(num_terms, self.parallel_dims.get_mesh("batch"))
        weight = self.config.nitp.weight if self._trains_objective() else 0.0
        self.loss_fn.begin_step(weight=weight, num_terms=num_terms)
        return iter(batches)

    def _global_losses(self) -> Tensor:
        """NTP loss and auxiliary loss of the step, over all ranks; a collective."""
        losses = self.loss_fn.losses.sum(0)
        if self.parallel_dims.dp_cp_enabled:
            losses = dist_utils.dist_sum_tensor(losses, self.parallel_dims.get_optional_mesh("loss"))
        return losses

    def train(self) -> None:
        """As `Trainer.train`; after SIGTERM or Ctrl-C it saves a checkpoint and exits with status `EXIT_PREEMPTED`."""
        with ends_with_others(self.cpu_group), self.stop:
            super().train()
            self.checkpointer.maybe_wait_for_saving()
            if self.plan.resume.from_step == self.config.training.steps:
                logger.info(f"All {self.plan.resume.from_step} steps were done before: nothing was left to train.")
            if not self.stopped:
                return
            saves = self.config.checkpoint.enable and not self.config.checkpoint.load_only
            if saves:
                self.stop.mark_saved()
        self.close()
        dist.destroy_process_group()
        if not saves:
            key = "load_only = true" if self.config.checkpoint.load_only else "enable = false"
            logger.warning(
                f"Stopped by {self.stop.reason} after step {self.step}. Nothing was saved ([checkpoint] {key}): the "
                f"same command starts again with step {1 + (self.plan.resume.from_step or 0)}."
            )
            sys.exit(128 + self.stop.number)
        logger.warning(f"Stopped by {self.stop.reason} after step {self.step}; the same command resumes from there.")
        sys.exit(EXIT_PREEMPTED)

    def should_continue_training(self) -> bool:
        """As `Trainer.should_continue_training`; called once a step, and saves where training has to stop."""
        if self._validates_again:
            self._validates_again = False
            self.validator.validate(self.model_parts, self.step)
        if not super().should_continue_training():
            return False
        self.stopped = self.stop.should_stop() or (self.config.validator.enable and self.validator.stopped)
        if self.stopped:
            self.checkpointer.save_now(self.step)
        return not self.stopped

    def state_dict(self) -> dict[str, Any]:
        """As `Trainer.state_dict`; tokens are those of all ranks, so that another number of ranks can resume."""
        return {**super().state_dict(), "ntokens_seen": self.ntokens_seen * self._num_token_ranks}

    @property
    def _num_token_ranks(self) -> int:
        """Ranks that count tokens of their own, each as many as any other."""
        return self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard * self.parallel_dims.cp

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.ntokens_seen //= self._num_token_ranks
        # A step is saved before it is validated, and the run may have ended in between.
        self._validates_again = (
            self.config.validator.enable
            and self.validator.should_validate(self.step)
            and not ranks.largest(self.metrics_processor.has_validated(self.step), self.cpu_group)
        )
        self.metrics_processor.resume(self.step, last_validation=self.step - self._validates_again)
