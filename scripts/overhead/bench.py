"""The parts of scripts/overhead, each as plain numbers."""

import dataclasses
import datetime
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nitp_titan.config import recipe
from nitp_titan.data.assets import prepare_stdlib_assets
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.machine import cpu
from nitp_titan.runs import provenance
from nitp_titan.sizing import meta_check
from nitp_titan.training.trainer import load_config
from overhead import counted
from overhead.measure import measure, peak_bytes
from overhead.variants import NAMES, variant_configs

_ASSETS = "assets/stdlib"
# Of a step on a CPU, where larger ones only take longer.
_CPU_TOKENS = 1024
# Largest first; the states of all three variants may take so much of a GPU, and so much the logits of MTP, whose loss
# is not computed in chunks (bfloat16, and float32 logits, log-softmax and gradient). The rest is for other activations.
_DENSE = ("dense/nitp_3b", "dense/nitp_2b", "dense/nitp_0.5b", "scaling/nitp_150m", "scaling/nitp_50m")
_STATES_SHARE, _LOGITS_SHARE = 0.4, 0.45
_STATE_BYTES, _LOGIT_BYTES = 16, 14
# On a GPU: name -> compile, CUDA graphs, float8.
_GPU_SETTINGS = {
    "bfloat16": (False, False, False),
    "bfloat16, compiled, CUDA graphs": (True, True, False),
    "float8, compiled, CUDA graphs": (True, True, True),
}


def log(line: str) -> None:
    """A line on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def measured(recipe_name: str | None, train_config: str | None, *, num_rounds: int, num_warmup: int) -> dict[str, Any]:
    """NTP, NITP and MTP on one device of this machine.

    The text is that of Python's standard library whatever the recipe, and a step is one micro-batch: the cost of NITP
    depends on neither.

    Args:
        recipe_name, train_config: by path or short name; None for those of this device.
        num_rounds, num_warmup: as in `measure`.

    Returns:
        ``machine``, ``recipe``, ``train_config``, ``batch`` and ``settings``: `measure` by name of the setting. On a
        CPU ``unchunked`` has the peak bytes of NTP and NITP with the loss in one chunk.

    Raises:
        UserError: if recipe and train config do not fit each other or this machine.
    """
    # What torchrun would say of one rank.
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ.update({key: value for key, value in defaults.items() if key not in os.environ})
    on_cpu = cpu.active()
    train_config = train_config or ("cpu" if on_cpu else "h100x1")
    recipe_name = recipe_name or ("overhead/nitp_ratio_9b" if on_cpu else _largest_that_fits(train_config))
    paths = recipe.find(recipe_name, "recipes"), recipe.find(train_config, "train_configs")
    prepare_stdlib_assets(Path(_ASSETS))
    configs = variant_configs(*paths, **_changes(load_config(*paths)))
    settings = {}
    for name, changed in _settings(configs, on_cpu):
        log(f"{recipe_name}, {name}: {', '.join(changed)}")
        settings[name] = measure(changed, num_rounds=num_rounds, num_warmup=num_warmup, log=log)
    found = {
        "machine": machine(),
        "recipe": recipe_name,
        "train_config": train_config,
        "seq_len": configs["NTP"].training.seq_len,
        "batch_size": configs["NTP"].training.global_batch_size,
        "settings": settings,
    }
    if on_cpu:
        log("memory with the loss in one chunk")
        whole = {name: _with(configs[name], "loss", num_chunks=1) for name in ("NTP", "NITP")}
        found["unchunked"] = peak_bytes(whole)
    return found


def full_size() -> dict[str, Any]:
    """The paper's models: `counted.full_size` and `counted.communication`."""
    return {**counted.full_size(log), "communication": counted.communication(log)}


def growth() -> dict[str, Any]:
    """As `counted.growth`."""
    return counted.growth(log)


def _changes(config) -> dict[str, Any]:
    local = min(config.training.local_batch_size, config.training.global_batch_size)
    if cpu.active():
        local = min(local, _CPU_TOKENS // config.training.seq_len)
    else:
        logits = _LOGIT_BYTES * config.training.seq_len * config.model_spec.model.vocab_size
        local = min(local, int(_LOGITS_SHARE * torch.accelerator.get_memory_info()[1] / logits))
    local = max(1, local)
    training = dataclasses.replace(config.training, local_batch_size=local, global_batch_size=local)
    loader = TextDataLoader.Config(dataset="json", dataset_path=f"{_ASSETS}/train.jsonl")
    return {"training": training, "dataloader": loader, "hf_assets_path": _ASSETS}


def _settings(configs: dict, on_cpu: bool) -> Iterator[tuple[str, dict]]:
    if on_cpu:
        yield "float32, eager", configs
        return
    for name, (compiled, graphs, float8) in _GPU_SETTINGS.items():
        yield (
            name,
            {
                variant: _with(
                    _with(_with(config, "compile", enable=compiled), "training", disable_cuda_graphs=not graphs),
                    "float8",
                    enable=float8,
                )
                for variant, config in configs.items()
            },
        )


def _with(config, section: str, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def _largest_that_fits(train_config: str) -> str:
    memory = torch.accelerator.get_memory_info()[1]
    for name in _DENSE:
        counts = meta_check.counts_of(recipe.find(name, "recipes"), recipe.find(train_config, "train_configs"))
        states = _STATE_BYTES * (counts.parameters + counts.projector_parameters)
        if len(NAMES) * states <= _STATES_SHARE * memory:
            return name
    return _DENSE[-1]


def machine() -> dict[str, Any]:
    """Machine, versions and date of the measurement."""
    device, versions = "CPU" if cpu.active() else torch.cuda.get_device_name(), provenance.versions()
    return {
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "date": datetime.date.today().isoformat(),
        **{name: versions[name] for name in ("python", "torch", "torchtitan")},
    }
