"""The three variants whose cost is compared: NTP, NITP and MTP, on one model, one machine and the same batches."""

import dataclasses
from pathlib import Path

from torchtitan.models.deepseek_v3.mtp import MTPLoss

from nitp_titan.errors import UserError
from nitp_titan.machine import cpu
from nitp_titan.objectives.settings import NITPConfig
from nitp_titan.training.trainer import load_config
from overhead.mtp import with_mtp

NAMES = ("NTP", "NITP", "MTP")


def variant_configs(recipe_path: Path, train_config: Path, **changes) -> dict:
    """Training configs by variant name; they differ in their auxiliary objective alone.

    Nothing is measured, validated or saved in between: the cost of a step is that of training.

    Args:
        recipe_path: a NITP recipe. NTP is the same without `[nitp]`, MTP is NTP with one MTP layer and TorchTitan's
            loss for it, which is not computed in chunks.
        train_config: where and how.
        changes: fields of ``NITPTrainer.Config`` that replace theirs.

    Raises:
        UserError: if the recipe does not train NITP.
    """
    cpu.install()
    config = load_config(recipe_path, train_config)
    if not config.nitp.enabled:
        raise UserError(f"{recipe_path}: [nitp] weight = 0; the cost of NITP is measured with a NITP recipe.")
    off = {
        "checkpoint": dataclasses.replace(config.checkpoint, enable=False),
        "validator": dataclasses.replace(config.validator, enable=False),
        "geometry": dataclasses.replace(config.geometry, enable=False, layers=False),
        "metrics": dataclasses.replace(config.metrics, enable_tensorboard=False, enable_wandb=False),
    }
    nitp = dataclasses.replace(config, **(off | changes))
    ntp = dataclasses.replace(nitp, nitp=NITPConfig())
    mtp = dataclasses.replace(ntp, model_spec=with_mtp(ntp.model_spec), loss=MTPLoss.Config(global_vocab_size=None))
    return dict(zip(NAMES, (ntp, nitp, mtp)))
