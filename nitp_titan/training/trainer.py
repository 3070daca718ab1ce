"""NITPTrainer: TorchTitan's Trainer with the `[nitp]` section and exact NITP counts."""

import copy
import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, IGNORE_INDEX
from torchtitan.components.quantization import Float8LinearConverter
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from nitp_titan import credentials
from nitp_titan.checkpoint.initial_load import check_initial_load
from nitp_titan.checkpoint.manager import NITPCheckpointManager
from nitp_titan.checkpoint.optimizer_states import create_states, leave_out
from nitp_titan.checkpoint.resume import has_ended
from nitp_titan.config.constraints import check_ranges
from nitp_titan.config.overrides import overridden
from nitp_titan.config.parallelism import check_layout
from nitp_titan.config.sections import (
    Float8Config,
    GeometryConfig,
    GuardConfig,
    MachineConfig,
    ModelConfig,
    NITPConfig,
)
from nitp_titan.data.loader import check_sources, TextDataLoader
from nitp_titan.errors import upstream_refusals, UserError
from nitp_titan.export.export import check_last_save
from nitp_titan.geometry.tracker import GeometryMeter, measured_states
from nitp_titan.models import meta_tensors
from nitp_titan.objectives.loss import ChunkedLoss, find_loss, NITPLoss
from nitp_titan.objectives.maths import trained_positions
from nitp_titan.objectives.variant import with_nitp
from nitp_titan.runs import agreement, run_folder
from nitp_titan.runs.preflight import check_run, open_log
from nitp_titan.runs.restarts import use_fresh_store
from nitp_titan.training import cpu
from nitp_titan.training.bad_steps import Guard, StepSkipped
from nitp_titan.training.lr_scheduler import WSDSchedulers
from nitp_titan.training.metrics import NITPMetrics
from nitp_titan.training.preemption import ends_with_others, STOPPED, StopSignal
from nitp_titan.training.validator import ProbingValidator


class NITPTrainer(Trainer):
    """Trains NTP alone (weight 0: TorchTitan's own path) or NTP plus NITP."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """``model_spec`` and ``loss`` are those without NITP; the trainer adds it when it is built."""

        model: Annotated[ModelConfig, tyro.conf.Suppress] = field(default_factory=ModelConfig)
        nitp: NITPConfig = field(default_factory=NITPConfig)
        geometry: GeometryConfig = field(default_factory=GeometryConfig)
        guard: GuardConfig = field(default_factory=GuardConfig)
        float8: Float8Config = field(default_factory=Float8Config)
        lr_scheduler: WSDSchedulers.Config = field(default_factory=WSDSchedulers.Config)
        metrics: NITPMetrics.Config = field(default_factory=NITPMetrics.Config)
        validator: ProbingValidator.Config = field(default_factory=ProbingValidator.Config)
        checkpoint: NITPCheckpointManager.Config = field(default_factory=NITPCheckpointManager.Config)
        machine: MachineConfig = field(default_factory=MachineConfig)
        resume: bool = False
        """Go on with the run in dump_folder although its recipe or data have changed, for example for more steps."""

        overwrite: bool = False
        """Start anew in dump_folder; the run that is there is kept beside it, as <dump_folder>.1, .2, ..."""

        def __post_init__(self) -> None:
            Trainer.Config.__post_init__(self)
            credentials.check_settings(self)
            check_ranges(self)
            if self.model_spec is not None:
                self.nitp.check_model(len(self.model_spec.model.layers), self.model_spec.model.dim)
            find_loss(self.nitp.loss)
            self.nitp.check_parallelism(self.parallelism)
            for table, enabled in (("nitp", self.nitp.enabled), ("geometry", self.geometry.enable)):
                if enabled and not isinstance(self.loss, ChunkedLossWrapper.Config):
                    raise UserError(f"[{table}] needs TorchTitan's ChunkedLossWrapper as loss.", table=table)

    def __init__(self, config: Config):
        check_layout(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        spec, loss = model_spec_with_nitp(config), loss_with_nitp(config)
        # The other ranks of a node wait for its first one where the process group is made.
        self._run = config, plan_start(config, spec) if agreement.leads_node(config) else None
        validator = validator_with_streams(config)
        with upstream_refusals():
            super().__init__(cpu.prepare(dataclasses.replace(config, model_spec=spec, loss=loss, validator=validator)))
        if not config.checkpoint.create_seed_checkpoint:
            create_states(self.optimizers)
        if config.nitp.enabled:
            self._prepare_nitp()
        self.meter = self._meter() if config.geometry.enable else None
        if config.validator.enable:
            self.validator.prepare(
                last_step=config.training.steps,
                batches_per_step=self.gradient_accumulation_steps,
                meter=self.meter,
                # After the last step nothing else is left to do.
                told_to_stop=lambda: self.stop.received and self.step < config.training.steps,
            )
        self.guard = self._guard()
        self.stopped = self._validates_again = False
        # On the CPU, so that no device waits while ranks agree on a stop or on the end of the data.
        num_ranks = torch.distributed.get_world_size()
        self._cpu_group = torch.distributed.new_group(backend="gloo") if num_ranks > 1 else None
        self.stop = StopSignal(self._cpu_group)
        if isinstance(self.dataloader, TextDataLoader):
            self.dataloader.any_rank = lambda found: bool(agreement.largest(found, self._cpu_group))
        if torch.distributed.get_rank() == 0:
            documents = getattr(self.dataloader, "num_documents", None)
            self.checkpointer.after_save = partial(self.start.note_checkpoint, documents=documents)
            settings = dataclasses.replace(config.checkpoint, initial_load_path=self.start.initial_load_path)
            recorded = dataclasses.replace(config, checkpoint=settings)
            self.start.record(recorded, documents=documents, hosts=self._hosts, world_size=num_ranks)

    def init_distributed(self) -> ParallelDims:
        """As `Trainer.init_distributed`; then all ranks agree on what they run, and the run folder is settled."""
        use_fresh_store()
        parallel_dims = super().init_distributed()
        self._agree()
        open_log(self.config.dump_folder)
        return parallel_dims

    def _agree(self) -> None:
        """Learn how this start goes on, the same on all ranks; a finished run ends here."""
        self._hosts, self.start = agreement.settle(*self._run)
        if self.start.finished:
            torch.distributed.destroy_process_group()
            sys.exit()
        settings = self.config.checkpoint
        # Rank 0 has decided what is loaded; of a remote folder it knows no step.
        load_step = settings.load_step if self.start.from_step is None else self.start.from_step
        self.config.checkpoint = dataclasses.replace(
            settings, load_step=load_step, initial_load_path=self.start.initial_load_path
        )
        if self.config.metrics.enable_wandb:
            # The only way to TorchTitan's logger.
            os.environ |= {"WANDB_RUN_ID": self.start.wandb_id, "WANDB_RESUME": "allow"}

    def _prepare_nitp(self) -> None:
        has_loss = not self.parallel_dims.pp_enabled or self.pp_has_last_stage
        self.loss_fn.prepare(
            self.model_parts[-1].nitp.projector if has_loss else None,
            num_microbatches=self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches,
            device=self.device,
        )
        self.metrics_processor.loss_parts = self._global_loss_parts
        if has_loss and self.config.nitp.start_step > 0:
            projector = list(self.model_parts[-1].nitp.parameters())
            leave_out(self.optimizers, projector, when=lambda: not self._trains_nitp())

    def _trains_nitp(self) -> bool:
        return self.step > self.config.nitp.start_step

    def _meter(self) -> GeometryMeter:
        config = self.config
        microbatch_size = config.training.local_batch_size // self.num_pipeline_parallel_microbatches
        meter = GeometryMeter(
            config.geometry,
            config.nitp,
            states=measured_states(config.geometry, config.nitp, len(self.model_config.layers)),
            dim=self.model_config.dim,
            seq_len=config.training.seq_len,
            batch_size=microbatch_size,
            last_step=config.training.steps,
            parallel_dims=self.parallel_dims,
            parallelism=config.parallelism,
            device=self.device,
        )
        self.loss_fn.meter = self.metrics_processor.meter = meter
        for part in self.model_parts:
            part.meter = meter
        return meter

    def _guard(self) -> Guard:
        loss_mesh, pp_mesh = (self.parallel_dims.get_optional_mesh(axis) for axis in ("loss", "pp"))
        guard = Guard(
            self.config.guard,
            model_parts=self.model_parts,
            num_losses=self.gradient_accumulation_steps,
            loss_figures=self.loss_fn.figures if self.config.nitp.enabled else None,
            has_loss=pp_mesh is None or self.pp_has_last_stage,
            num_loss_shares=1 if loss_mesh is None else loss_mesh.size(),
            stage=0 if pp_mesh is None else pp_mesh.get_local_rank(),
            device=self.device,
            metrics=self.metrics_processor,
            last_checkpoint=self.checkpointer.last_checkpoint,
        )
        self.checkpointer.before_save = guard.verify_weights
        return guard

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """One optimizer step, measured where geometry is due; a bad one is left out or ends training (`Guard`)."""
        try:
            self._train_step(data_iterator)
        except StepSkipped:
            self.lr_schedulers.step()
            if self.meter is not None:
                self.meter.active = False

    def forward_backward_step(self, **inputs: Any) -> Tensor:
        """As `Trainer.forward_backward_step`; every loss and gradient passes by the guard."""
        loss = super().forward_backward_step(**inputs)
        self.guard.see(self.step, loss)
        return loss

    def _train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        if self.config.nitp.enabled:
            data_iterator = self._counted(data_iterator)
        if self.meter is None or not self.meter.due(self.step):
            return super().train_step(data_iterator)
        num_microbatches = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
        self.meter.measure(num_microbatches, seed=self.config.geometry.seed + self.step)
        with self._without_cuda_graph():
            super().train_step(data_iterator)

    @contextmanager
    def _without_cuda_graph(self) -> Iterator[None]:
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
        if self.meter is not None:
            self.meter.expect(input_dict["positions"], labels, passed=(extra["positions"], passed_labels))
        return inputs, passed_labels, extra

    def _counted(
        self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """The micro-batches of a step, after their NITP positions are counted over all ranks."""
        nitp = self.config.nitp
        num_microbatches = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
        batches = [next(data_iterator) for _ in range(num_microbatches)]
        num_terms = sum(count_terms(inputs, labels, nitp) for inputs, labels in batches).to(self.device)
        if self.parallel_dims.dp_enabled:
            num_terms = dist_utils.dist_sum_tensor(num_terms, self.parallel_dims.get_mesh("batch"))
        self.loss_fn.set_step(weight=nitp.weight if self._trains_nitp() else 0.0, num_terms=num_terms)
        return iter(batches)

    def _global_loss_parts(self) -> Tensor:
        parts = self.loss_fn.parts.sum(0)
        if self.parallel_dims.dp_cp_enabled:
            parts = dist_utils.dist_sum_tensor(parts, self.parallel_dims.get_optional_mesh("loss"))
        return parts

    def train(self) -> None:
        """As `Trainer.train`; after SIGTERM or Ctrl-C it saves a checkpoint and exits with status `STOPPED`."""
        with ends_with_others(self._cpu_group), self.stop:
            super().train()
            self.checkpointer.maybe_wait_for_saving()
            if self.start.from_step == self.config.training.steps:
                logger.info(f"All {self.start.from_step} steps were done before: nothing was left to train.")
            if not self.stopped:
                return
            saves = self.config.checkpoint.enable and not self.config.checkpoint.load_only
            if saves:
                self.stop.announce()
        self.close()
        torch.distributed.destroy_process_group()
        if not saves:
            key = "load_only = true" if self.config.checkpoint.load_only else "enable = false"
            logger.warning(
                f"Stopped by {self.stop.reason} after step {self.step}. Nothing was saved ([checkpoint] {key}): the "
                f"same command starts again with step {1 + (self.start.from_step or 0)}."
            )
            sys.exit(128 + self.stop.number)
        logger.warning(f"Stopped by {self.stop.reason} after step {self.step}; the same command goes on from there.")
        sys.exit(STOPPED)

    def should_continue_training(self) -> bool:
        """As `Trainer.should_continue_training`; called once a step, and saves where training has to stop."""
        if self._validates_again:
            self._validates_again = False
            self.validator.validate(self.model_parts, self.step)
        if not super().should_continue_training():
            return False
        self.stopped = self.stop.agreed() or (self.config.validator.enable and self.validator.stopped)
        if self.stopped:
            self.checkpointer.save_now(self.step)
        return not self.stopped

    def state_dict(self) -> dict[str, Any]:
        """As `Trainer.state_dict`; tokens are those of all ranks, so that other ranks can go on."""
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
            and not agreement.largest(self.metrics_processor.has_validated(self.step), self._cpu_group)
        )
        self.metrics_processor.resume(self.step, last_validation=self.step - self._validates_again)


def plan_start(config: NITPTrainer.Config, spec: ModelSpec) -> run_folder.Start:
    """Check what a config names on this machine's disks, and find out how training starts; before anything is built.

    Raises:
        UserError: naming what is missing, damaged or does not fit.
    """
    check_sources(config)
    if (note := config.nitp.note(config.training.steps)) is not None:
        logger.warning(note)
    # Built once for all checks, none of which looks at it without checkpoints.
    trained = overridden(config, spec)
    tensors = meta_tensors(trained) if config.checkpoint.enable else {}
    check_run(config, spec, tensors)
    check_last_save(config, spec, tensors)
    start = run_folder.find_start(config)
    if not start.set_aside:
        start = dataclasses.replace(start, finished=has_ended(config, tensors, start.from_step))
    if start.from_step is None:
        config = check_initial_load(config, spec, tensors)
    return dataclasses.replace(start, initial_load_path=config.checkpoint.initial_load_path)


def count_terms(inputs: dict[str, Tensor], labels_BL: Tensor, settings: NITPConfig) -> Tensor:
    """Number of terms that the objective averages over, in one whole micro-batch.

    Returns:
        Scalar, int64: valid positions for NITP; sequences that have a pair of trained
        tokens for the cosine regulariser.
    """
    if settings.objective == "cosine_regularizer":
        return ((labels_BL != IGNORE_INDEX).sum(1) >= 2).sum()
    return trained_positions(
        inputs["positions"], labels_BL, temporal_shift=settings.temporal_shift, ignore_index=IGNORE_INDEX
    ).sum()


# Pipeline schedules that compute gradients of inputs and of weights apart.
_SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def loss_with_nitp(config: NITPTrainer.Config) -> BaseLoss.Config:
    """The loss that a config trains: TorchTitan's own for NTP, except where that would be wrong."""
    loss, parallelism = config.loss, config.parallelism
    splits = parallelism.pipeline_parallel_degree > 1 and (
        parallelism.pipeline_parallel_schedule in _SPLIT_BACKWARD or bool(parallelism.pipeline_parallel_schedule_csv)
    )
    ours = splits or config.nitp.enabled or config.geometry.enable
    if not isinstance(loss, ChunkedLossWrapper.Config) or not ours:
        return loss
    chunked = {"num_chunks": loss.num_chunks, "loss_fn": loss.loss_fn, "keep_unsharded": splits}
    return NITPLoss.Config(**chunked, nitp=config.nitp) if config.nitp.enabled else ChunkedLoss.Config(**chunked)


def validator_with_streams(config: NITPTrainer.Config) -> ProbingValidator.Config:
    """The validator of a config; its text is read in as many streams as that of training, unless it says otherwise."""
    data = config.validator.dataloader
    if not isinstance(data, TextDataLoader.Config) or data.num_streams is not None:
        return config.validator
    num_streams = getattr(config.dataloader, "num_streams", None)
    return dataclasses.replace(config.validator, dataloader=dataclasses.replace(data, num_streams=num_streams))


def model_spec_with_nitp(config: NITPTrainer.Config) -> ModelSpec:
    """The model that a config trains: backbone, NITP if enabled, then float8 over both.

    A copy: TorchTitan fills and converters replace configs in place, and a config may be built again.
    """
    spec = dataclasses.replace(config.model_spec, model=copy.deepcopy(config.model_spec.model))
    if config.nitp.enabled or (config.geometry.enable and config.geometry.layers):
        spec = with_nitp(spec, config.nitp)
    if config.float8.enable:
        converter = Float8LinearConverter.Config(
            recipe_name=config.float8.recipe_name,
            filter_fqns=config.float8.filter_fqns,
            emulate=config.float8.emulate,
            model_compile_enabled=config.compile.enable and "model" in config.compile.components,
        )
        try:
            spec = dataclasses.replace(spec, model=converter.build().convert(spec.model))
        except (ImportError, ValueError) as error:
            # Without torchao, or on a device that lacks float8.
            raise UserError(f"[float8] enable = true: {error}", table="float8", key="enable") from None
    return spec
