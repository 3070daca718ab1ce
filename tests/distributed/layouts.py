"""Worker on each rank: trains layouts of `matrix.LAYOUTS` from seed checkpoints and writes their results as JSON.

    tests/distributed/layouts.py FOLDER PORTS.json

PORTS.json holds ``{name: free port}``; a name is that of a layout, or ``seeds/<model>`` for the seed checkpoint.
"""

import dataclasses
import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from helpers import gradient_norms, make_config, weight_norm
from matrix import Layout, LAYOUTS

from nitp_titan.config import schedules
from nitp_titan.objectives import nitp, parallelize
from nitp_titan.runs import preflight
from nitp_titan.training.trainer import NITPTrainer


def _without_halo(z_chunks, position_chunks, group):
    return [(torch.zeros_like(z_chunks[0][:, 0]), None)] * len(z_chunks)


def _shard_local_shift(z_chunks, position_chunks, group):
    """The state after a chunk is its own first one, as a shift without exchange would have it."""
    return [(z[:, 0], positions[:, -1] + 1) for z, positions in zip(z_chunks, position_chunks)]


def _break(control: str | None) -> None:
    if control == "no halo":
        nitp._halo = _without_halo
    elif control == "shard-local shift":
        nitp._halo = _shard_local_shift
    elif control == "no divide factor":
        parallelize.disable_fsdp_gradient_division = lambda module: None
    elif control == "resharded":
        schedules.SPLIT_BACKWARD = ()
    elif control == "no check":
        preflight.check_parallelism = lambda config, world_size: None
    else:
        assert control is None, control


def make_seed(folder: Path, model: str) -> None:
    """Write the initial weights of a model, unsharded."""
    config = make_config(folder / "seeds" / model, **LAYOUTS[f"{model}/one"].sections)
    checkpoint = dataclasses.replace(config.checkpoint, enable=True, create_seed_checkpoint=True)
    run = dataclasses.replace(config, checkpoint=checkpoint).build()
    run.checkpointer.save(curr_step=0, last_step=True)
    run.close()


def run_layout(folder: Path, layout: Layout) -> dict:
    """Results of one layout: float64 gradient norms per step, the guard's, the norm of all weights, linears by type."""
    _break(layout.control)
    seed = str(folder / "seeds" / layout.model / "checkpoint/step-0")
    checkpoint = {"enable": True, "load_only": True, "initial_load_path": seed}
    config = make_config(folder / layout.name, **layout.sections, checkpoint=checkpoint)
    # Adam gives the smallest gradient a full step, and with it their rounding; a large eps does not.
    config.optimizer.param_groups[0].optimizer_kwargs["eps"] = 1e-3
    run = config.build()
    run.checkpointer.load(step=-1)
    batches = run.batch_generator(run.dataloader)
    norms, guarded = [], []
    for step in range(1, config.training.steps + 1):
        run.step = step
        run.train_step(batches)
        norms.append(gradient_norms(run))
        guarded.append(run.bad_steps.measure()[0].sqrt().item())
    if config.validator.enable:
        run.validator.validate(run.model_parts, run.step)
    results = {"norms": norms, "guarded": guarded, "weights": weight_norm(run), "linears": linear_types(run)}
    run.close()
    return results


def linear_types(run: NITPTrainer) -> dict[str, str]:
    """Class of every linear layer on this rank, by name."""
    modules = [item for part in run.model_parts for item in part.named_modules()]
    return {name: type(module).__name__ for name, module in modules if isinstance(module, torch.nn.Linear)}


def in_child(path: Path, port: int, work: Callable[[], dict | None]) -> None:
    """Do some work in a forked process: TorchTitan's meshes are globals, its import takes seconds.

    Rank 0 writes what the work returns to ``path``. Beside it any rank writes ``.<rank>.error``, the reason of
    its failure, or ``.<rank>.signal``, what ended its process from outside of Python.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            path.with_suffix(f".{os.environ['RANK']}.signal").write_text(signal.Signals(os.WTERMSIG(status)).name)
        return
    # Where it was goes to stderr, which the launch's log keeps.
    faulthandler.enable()
    try:
        os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
        result = work()
        if os.environ["RANK"] == "0":
            path.write_text(json.dumps(result))
    except Exception:
        path.with_suffix(f".{os.environ['RANK']}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def main() -> None:
    folder, ports = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, port in ports.items():
        kind, _, model = name.partition("/")
        work = partial(make_seed, folder, model) if kind == "seeds" else partial(run_layout, folder, LAYOUTS[name])
        in_child(folder / f"{name}.json", port, work)


if __name__ == "__main__":
    main()
