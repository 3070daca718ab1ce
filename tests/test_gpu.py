"""The one-GPU part of the matrix: kernels, graphs and number formats that a CPU lacks.

    ./scripts/test.sh -m gpu

Every technique trains the same steps from the same seed as plain eager training does.
"""

import pytest
import torch
from helpers import gradient_norms, make_config, parameters
from torchtitan.distributed.activation_checkpoint import MemoryBudgetAC

from nitp_titan.errors import UserError
from nitp_titan.machine.cpu import DENSE_ATTENTION
from nitp_titan.objectives.objective import local
from nitp_titan.step_files import read_records

# TorchTitan's CUDA graphs are captured after warm-up steps; these go on beyond them.
STEPS = 6
EAGER = {
    "training": {"disable_cuda_graphs": True, "mixed_precision_param": "float32"},
    "compile": {"enable": False},
}
COMPILED = {"compile": {"enable": True, "components": ["model", "loss"]}}

pytestmark = pytest.mark.gpu


def _config(folder, model="nitp_debug", **sections):
    training = {"steps": STEPS, "seq_len": 256, **EAGER["training"], **sections.pop("training", {})}
    sections = {**EAGER, "nitp": {"weight": 20.0}, **sections, "training": training}
    return make_config(folder, recipe=f"debug/{model}", train_config="gpu", **sections)


def _train(folder, *, start=None, **sections) -> tuple[list[dict], list[dict], dict[str, torch.Tensor]]:
    """Records and float64 gradient norms of every step, and the weights before the first.

    Args:
        start: weights to begin with, where the seed draws others: CPU and GPU do not draw the same numbers.
    """
    trainer = _config(folder, **sections).build()
    if start is not None:
        _set_weights(trainer, start)
    start = parameters(trainer)
    batches = trainer.batch_generator(trainer.dataloader)
    norms = []
    for step in range(1, STEPS + 1):
        trainer.step = step
        trainer.train_step(batches)
        norms.append(gradient_norms(trainer))
    trainer.close()
    return read_records(folder / "metrics.jsonl"), norms, start


@torch.no_grad()
def _set_weights(trainer, weights) -> None:
    for part in trainer.model_parts:
        for name, weight in part.named_parameters():
            local(weight).copy_(weights[name])


def _check_close(ours, expected, *, loss: float, gradient: float, gradient_steps: int = STEPS) -> None:
    """Differences of rounding grow from step to step: coarse numbers have their gradients compared in the first."""
    for record, other in zip(ours[0], expected[0], strict=True):
        for key in ("ntp_loss", "nitp_loss"):
            assert record[key] == pytest.approx(other[key], abs=loss), (record["step"], key)
    for norms, other in list(zip(ours[1], expected[1], strict=True))[:gradient_steps]:
        for group in ("projector", "rest"):
            assert norms[group] == pytest.approx(other[group], rel=gradient), group


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("eager"))


@pytest.mark.technique("FlexAttention kernels (GPU)", "dense", "1 GPU")
def test_flex_attention_kernels_agree_with_dense_attention(eager, tmp_path):
    _check_close(_train(tmp_path, override={"imports": [DENSE_ATTENTION]}), eager, loss=1e-3, gradient=1e-2)


@pytest.mark.technique("torch.compile of model and loss", "dense", "1 GPU")
def test_compiled_model_and_loss_agree_with_eager(eager, tmp_path):
    _check_close(_train(tmp_path, **COMPILED), eager, loss=1e-3, gradient=1e-2)


@pytest.mark.technique("CUDA graphs (GPU)", "dense", "1 GPU")
@pytest.mark.parametrize("compiled", [{}, COMPILED], ids=["eager", "compiled"])
def test_cuda_graphs_replay_what_eager_training_computes(eager, tmp_path, compiled):
    graphs = _train(tmp_path, training={"disable_cuda_graphs": False}, **compiled)
    _check_close(graphs, eager, loss=1e-3, gradient=1e-2)


def test_cuda_graphs_see_the_start_step_and_the_counts_of_each_step(tmp_path):
    """The weight and the divisor of the NITP loss change between replays."""
    late = {"weight": 20.0, "start_step": 4}
    graphs = _train(tmp_path / "graphs", training={"disable_cuda_graphs": False}, nitp=late)
    plain = _train(tmp_path / "plain", nitp=late)
    _check_close(graphs, plain, loss=1e-3, gradient=1e-2)
    assert [norms["projector"] > 0 for norms in graphs[1]] == [False] * 4 + [True] * 2


@pytest.mark.technique("geometry between CUDA graphs (GPU)", "dense", "1 GPU")
def test_steps_that_measure_geometry_stand_between_replayed_ones(eager, tmp_path):
    geometry = {"enable": True, "interval": 2, "layers": True}
    graphs = _train(tmp_path / "graphs", training={"disable_cuda_graphs": False}, geometry=geometry)
    _check_close(graphs, eager, loss=1e-3, gradient=1e-2)
    _train(tmp_path / "eager", geometry=geometry)
    ours, expected = (read_records(tmp_path / name / "geometry.jsonl") for name in ("graphs", "eager"))
    assert [record["step"] for record in ours] == [record["step"] for record in expected] == [1, 2, 4, 6]
    for record, other in zip(ours, expected):
        for state in set(other) - {"step"}:
            for stat in ("effective_rank", "rankme", "participation_ratio", "cosine", "cosine_sampled"):
                assert record[state][stat] == pytest.approx(other[state][stat], rel=1e-2, abs=1e-3), state


@pytest.mark.technique("activation checkpointing", "dense", "memory-budget AC, 1 GPU")
def test_memory_budget_checkpointing_agrees_with_eager(eager, tmp_path):
    budget = MemoryBudgetAC.Config(memory_budget=0.3)
    _check_close(_train(tmp_path, activation_checkpoint=budget, **COMPILED), eager, loss=1e-3, gradient=1e-2)


@pytest.mark.technique("CPU offload (GPU)", "dense", "1 GPU")
def test_cpu_offload_agrees_with_eager(eager, tmp_path):
    # Offloaded weights are initialised on the CPU.
    offloaded = _train(tmp_path, start=eager[2], training={"enable_cpu_offload": True})
    _check_close(offloaded, eager, loss=1e-3, gradient=1e-2)


@pytest.mark.technique("bfloat16 mixed precision", "dense", "1 GPU")
def test_bfloat16_is_near_float32(eager, tmp_path):
    bfloat16 = _train(tmp_path, training={"mixed_precision_param": "bfloat16"})
    _check_close(bfloat16, eager, loss=2e-2, gradient=2e-2, gradient_steps=4)


@pytest.mark.technique("float8 (GPU)", "dense", "1 GPU")
def test_float8_in_hardware_is_near_float32(eager, tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("not run: this GPU has no float8")
    # Rowwise scaling wants dimensions that are multiples of 16, and bfloat16 around it.
    float8 = {"enable": True}
    training = {"mixed_precision_param": "bfloat16"}
    hardware = _train(tmp_path, float8=float8, training=training, **COMPILED)
    _check_close(hardware, eager, loss=5e-2, gradient=5e-2, gradient_steps=4)


@pytest.mark.technique("no host synchronisation (GPU)", "dense", "1 GPU")
def test_the_step_never_waits_for_the_gpu(tmp_path):
    trainer = _config(tmp_path, metrics={"log_freq": 100}).build()
    batches = trainer.batch_generator(trainer.dataloader)
    # Step 1 is logged, and initialises lazily.
    for step in (1, 2):
        trainer.step = step
        trainer.train_step(batches)
    batch, labels = next(batches)
    batch = {name: value.cuda() for name, value in batch.items()}
    inputs, labels, kwargs = trainer.post_dataloading_process(batch, labels.cuda())
    tokens = torch.tensor(labels.numel(), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.fwd_bwd_fn(inputs, labels, tokens, kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.close()


def test_a_bad_step_that_nobody_logs_does_not_reach_the_optimizer(tmp_path):
    trainer = _config(tmp_path, metrics={"log_freq": 100}).build()
    trainer.model_parts[0].nitp.projector.register_forward_hook(
        lambda module, args, output: output * float("nan") if trainer.step == 2 else None
    )
    batches = trainer.batch_generator(trainer.dataloader)
    trainer.step = 1
    trainer.train_step(batches)
    before = parameters(trainer)
    trainer.step = 2
    with pytest.raises(UserError, match="^step 2: the nitp loss of rank 0 is nan"):
        trainer.train_step(batches)
    after = parameters(trainer)
    assert all(torch.equal(before[name], after[name]) for name in after)
    trainer.close()
