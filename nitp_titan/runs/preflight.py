"""All checks and decisions before a trainer exists: a config becomes a plan."""

import dataclasses
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools import utils
from torchtitan.tools.filesystem import is_remote
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from nitp_titan.checkpoint.initial_load import check_initial_load
from nitp_titan.checkpoint.resume import check_resume
from nitp_titan.config.parallelism import check_parallelism
from nitp_titan.config.refusals import upstream_refusals
from nitp_titan.config.trained import overridden, trained
from nitp_titan.data.loader import check_sources
from nitp_titan.data.tokenizer import check_end_of_document, UnfitTokenizer
from nitp_titan.errors import UserError
from nitp_titan.export.export import check_last_save
from nitp_titan.files import check_writable, nearest_existing
from nitp_titan.machine import cpu
from nitp_titan.machine.failures import surroundings
from nitp_titan.models import meta_tensors
from nitp_titan.runs import ranks
from nitp_titan.runs.restarts import use_fresh_store
from nitp_titan.runs.run_folder import plan_resume, ResumePlan
from nitp_titan.runs.structured_log import open_log


@dataclass(frozen=True)
class Plan:
    """All that is decided before a trainer exists."""

    config: Trainer.Config
    """The trainer builds this one: model and loss with the objective, the step to load."""

    recorded: Trainer.Config
    """The run folder records this one: as given, with the checkpoint that a new run starts from."""

    resume: ResumePlan

    hosts: list[str]
    """Names of the hosts of all ranks, each once."""


def preflight(config: Trainer.Config) -> Plan:
    """Check all that a start can be refused for, make the process group, and claim the run folder. A collective.

    The way: layout, model and loss, this machine's files and the run folder (the first rank of each node), process
    group, agreement of all ranks, claim of the folder (rank 0). A finished run ends here, with status 0.

    Args:
        config: a ``NITPTrainer.Config``, as recipe, train config and flags make it.

    Raises:
        UserError: naming what is missing, damaged or does not fit.
    """
    check_parallelism(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    final = trained(config)
    # The other ranks of a node wait for its first one in `agree`.
    found = _plan_start(config, final.model_spec) if ranks.leads_node(config) else None
    final = cpu.prepare(final)
    _join_process_group(config)
    hosts, resume = ranks.agree(config, found)
    if resume.finished:
        torch.distributed.destroy_process_group()
        sys.exit()
    open_log(config.dump_folder)
    if config.metrics.enable_wandb:
        # The only way to TorchTitan's logger.
        os.environ |= {"WANDB_RUN_ID": resume.wandb_id, "WANDB_RESUME": "allow"}
    # Rank 0 has decided what is loaded; of a remote folder it knows no step.
    load_step = config.checkpoint.load_step if resume.from_step is None else resume.from_step
    checkpoint = dataclasses.replace(config.checkpoint, initial_load_path=resume.initial_load_path)
    return Plan(
        config=dataclasses.replace(final, checkpoint=dataclasses.replace(checkpoint, load_step=load_step)),
        recorded=dataclasses.replace(config, checkpoint=checkpoint),
        resume=resume,
        hosts=hosts,
    )


def _plan_start(config: Trainer.Config, spec: ModelSpec) -> ResumePlan:
    """Check what a config names on this machine's disks, and find out how training starts."""
    check_sources(config)
    if (warning := config.nitp.untrained_warning(config.training.steps)) is not None:
        logger.warning(warning)
    # Built once for all checks; a run without checkpoints needs none of them.
    built = overridden(config, spec)
    tensors = meta_tensors(built) if config.checkpoint.enable else {}
    _check_run(config, spec, tensors)
    check_last_save(config, spec, tensors)
    plan = plan_resume(config)
    if not plan.archived:
        plan = dataclasses.replace(plan, finished=check_resume(config, tensors, plan.from_step))
    if plan.from_step is None:
        config = check_initial_load(config, spec, tensors)
    return dataclasses.replace(plan, initial_load_path=config.checkpoint.initial_load_path)


def _join_process_group(config: Trainer.Config) -> None:
    """Make the process group as `Trainer.init_distributed` does; one that is there already is kept."""
    if torch.distributed.is_initialized():
        return
    use_fresh_store()
    # Before NCCL is: its first collective asks for the device.
    utils.device_module.set_device(utils.get_local_device())
    with upstream_refusals():
        dist_utils.init_distributed(
            config.comm, enable_cpu_backend=config.training.enable_cpu_offload, base_folder=config.dump_folder
        )


def _check_run(config, spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
    """Raise UserError for what a ``Trainer.Config`` names and is not there, or a folder that cannot take the run.

    Args:
        spec: the model to be trained, its projector included.
        tensors: of the model, as `meta_tensors` gives them; not looked at without checkpoints.
    """
    _check_tokenizer(config, spec)
    folder = config.dump_folder
    if not is_remote(folder):
        check_writable(Path(folder), f"dump_folder = '{folder}'", table="", key="dump_folder")
    _check_room(config, tensors)


def _check_tokenizer(config, spec: ModelSpec) -> None:
    path, vocab_size = config.hf_assets_path, spec.model.vocab_size
    try:
        tokenizer: BaseTokenizer = config.tokenizer.build(tokenizer_path=path)
        check_end_of_document(tokenizer)
    except UnfitTokenizer as error:
        raise UserError(f"hf_assets_path = '{path}'{error}", table="", key="hf_assets_path") from None
    except Exception as error:
        # The tokenizers' library raises nothing narrower.
        reason = f"holds no tokenizer that loads: {type(error).__name__}: {error}"
        found = surroundings(error, path)
        raise found or UserError(f"hf_assets_path = '{path}' {reason}", table="", key="hf_assets_path") from None
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"hf_assets_path = '{path}' has {tokenizer.get_vocab_size()} tokens, more than the model's vocabulary of "
            f"{vocab_size}.",
            table="",
            key="hf_assets_path",
        )


def checkpoint_bytes(config, tensors: dict[str, Tensor]) -> int:
    """Bytes of the largest checkpoint that a run saves: its model, and what the optimizer keeps of each parameter.

    Args:
        tensors: of the model to be trained, its projector included.
    """
    settings, steps = config.checkpoint, config.training.steps
    element = {"float32": 4, "bfloat16": 2}[config.training.dtype]
    numbers = sum(tensor.numel() for tensor in tensors.values())
    if steps < settings.interval and settings.last_save_model_only and not settings.enable_first_step_checkpoint:
        return numbers * {"float32": 4, "bfloat16": 2, "float16": 2}[settings.export_dtype]
    adam = all(group.optimizer_name in ("Adam", "AdamW") for group in config.optimizer.param_groups)
    state = 2 if config.optimizer.implementation == "fused_opt_states_bf16" else element
    # Adam keeps two moments, Muon one.
    return numbers * (element + (2 if adam else 1) * state)


def _check_room(config, tensors: dict[str, Tensor]) -> None:
    settings = config.checkpoint
    if not settings.enable or settings.load_only or is_remote(config.dump_folder) or is_remote(settings.folder):
        return
    folder = nearest_existing(Path(config.dump_folder, settings.folder))
    free, needed = shutil.disk_usage(folder).free, checkpoint_bytes(config, tensors)
    if free < needed:
        raise UserError(
            f"dump_folder = '{config.dump_folder}': one checkpoint needs {_gb(needed)} and the disk has {_gb(free)} "
            "free; choose another dump_folder, or [checkpoint] enable = false.",
            table="",
            key="dump_folder",
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.3f} GB"
