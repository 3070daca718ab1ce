"""Numbers that are not finite, put into real training: what stops, what is said, what is kept, what is left out."""

import math
import re
import time
from collections.abc import Callable

import pytest
import torch
from helpers import make_config, parameters
from processes import warm_ranks
from torch import nn

from nitp_titan.errors import UserError
from nitp_titan.step_files import read_records
from nitp_titan.training.bad_steps import BadModule, BadStepsConfig, describe, Finding
from nitp_titan.training.trainer import NITPTrainer

NAN = float("nan")


def _poison(
    trainer: NITPTrainer,
    name: str,
    steps: tuple[int, ...],
    *,
    gradient: bool = False,
    factor: float = NAN,
    microbatch: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Multiply a module's output, or the gradient of it, in some steps.

    Args:
        microbatch: the only one that is spoilt, from 0; None spoils all.

    Returns:
        List that gets all parameters as they were when the first number was spoilt.
    """
    before, calls = [], {}

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if trainer.step not in steps:
            return None
        number = calls[trainer.step] = calls.get(trainer.step, -1) + 1
        if microbatch is not None and number != microbatch:
            return None
        before.append(parameters(trainer))
        if not gradient:
            return output * factor
        output.register_hook(lambda grad: grad * factor)

    trainer.model_parts[0].get_submodule(name).register_forward_hook(hook)
    return before


def _build(folder, spoil: Callable[[NITPTrainer], object] | None = None, *, checkpoint=False, **sections):
    sections = {"training": {"steps": 4}, "lr_scheduler": {"warmup_steps": 2}} | sections
    saving = {"enable": checkpoint, "interval": 2, "last_save_model_only": False, "async_mode": "disabled"}
    trainer = make_config(folder, checkpoint=saving, **sections).build()
    spoilt = spoil(trainer) if spoil is not None else None
    return trainer, spoilt


def _run(trainer: NITPTrainer) -> None:
    """`Trainer.train` without its pause at the end."""
    trainer.checkpointer.load(step=-1)
    batches = trainer.batch_generator(trainer.dataloader)
    try:
        for step in range(trainer.step + 1, trainer.config.training.steps + 1):
            trainer.step = step
            trainer.train_step(batches)
            trainer.checkpointer.save(step, last_step=step == trainer.config.training.steps)
    finally:
        trainer.close()


def _message(trainer: NITPTrainer) -> str:
    with pytest.raises(UserError) as error:
        _run(trainer)
    return str(error.value)


def _contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _steps(folder, name: str = "metrics") -> list[int]:
    return [record["step"] for record in read_records(folder / f"{name}.jsonl")]


CASES = {
    "ntp": (("lm_head",), {}, r"step 3: the ntp loss of rank 0 is nan \(nitp \d\.\d+\)\."),
    "nitp": (("nitp.projector",), {}, r"step 3: the nitp loss of rank 0 is nan \(ntp \d\.\d+\)\."),
    "both": (("norm",), {}, r"step 3: the ntp loss of rank 0 is nan and the nitp loss of rank 0 is nan\."),
    "gradient": (
        ("layers.2.feed_forward",),
        {"gradient": True},
        r"step 3: the gradient of layers\.2 is nan in the backward pass of rank 0 "
        r"\(the losses are finite: ntp \d\.\d+, nitp \d\.\d+\)\.",
    ),
    "infinite gradient": (
        ("layers.0.attention.wo",),
        {"gradient": True, "factor": math.inf},
        r"step 3: the gradient of layers\.0 is nan in the backward pass of rank 0",
    ),
    "gradient of nitp": (
        ("nitp.projector",),
        {"gradient": True},
        r"step 3: the gradient of the nitp loss of rank 0 is nan \(the losses are finite: ntp \d\.\d+, nitp",
    ),
    "gradient of ntp": (
        ("lm_head",),
        {"gradient": True, "model": {"flavor": "debug_untied"}},
        r"step 3: the ntp gradient of lm_head\.weight is nan in the backward pass of rank 0 \(the losses",
    ),
    "NTP alone": (("lm_head",), {"recipe": "debug/ntp_debug"}, r"step 3: the ntp loss of rank 0 is nan\."),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_number_stops_the_step_is_named_and_reaches_no_checkpoint(assets, tmp_path, case):
    (module,), options, expected = CASES[case]
    options = dict(options)
    sections = {name: options.pop(name) for name in ("recipe", "model") if name in options}
    saved = []

    def spoil(trainer):
        save = trainer.checkpointer.save
        trainer.checkpointer.save = lambda *args, **kwargs: (
            save(*args, **kwargs),
            saved.append(_contents(tmp_path / "checkpoint")),
        )
        return _poison(trainer, module, (3,), **options)

    trainer, before = _build(tmp_path, spoil, checkpoint=True, **sections)
    message = _message(trainer)
    assert re.match(expected, message), message
    checkpoint = tmp_path / "checkpoint"
    assert message.endswith(f"Training has stopped. The last checkpoint, {checkpoint / 'step-2'}, is from before.")
    after = parameters(trainer)
    assert all(torch.equal(before[0][name], after[name]) for name in after)
    assert [path.name for path in checkpoint.iterdir()] == ["step-2"]
    assert _contents(checkpoint) == saved[-1] and len(saved[-1]) > 1
    assert _steps(tmp_path) == [1, 2]


def test_without_a_checkpoint_it_says_so(assets, tmp_path):
    trainer, _ = _build(tmp_path, lambda trainer: _poison(trainer, "lm_head", (1,)))
    assert _message(trainer).endswith("Training has stopped. There is no checkpoint yet.")


def test_one_bad_micro_batch_of_an_accumulated_step_is_enough(assets, tmp_path):
    sections = {"training": {"steps": 2, "global_batch_size": 8}, "recipe": "debug/ntp_debug"}
    trainer, before = _build(tmp_path, lambda trainer: _poison(trainer, "lm_head", (2,), microbatch=1), **sections)
    # lm_head is called once per chunk of a micro-batch.
    assert _message(trainer).startswith("step 2: the ntp loss of rank 0 is nan.")
    after = parameters(trainer)
    assert all(torch.equal(before[0][name], after[name]) for name in after)


@pytest.mark.parametrize("module", ["lm_head", "nitp.projector"])
def test_a_bad_step_that_nobody_logs_does_not_reach_the_optimizer(assets, tmp_path, module):
    trainer, before = _build(tmp_path, lambda trainer: _poison(trainer, module, (2,)), metrics={"log_freq": 100})
    part = "ntp" if module == "lm_head" else "nitp"
    assert _message(trainer).startswith(f"step 2: the {part} loss of rank 0 is nan")
    after = parameters(trainer)
    assert trainer.step == 2 and all(torch.equal(before[0][name], after[name]) for name in after)


def test_a_run_that_has_skipped_more_than_its_new_bound_stops_at_the_next_bad_step(assets, tmp_path):
    def spoil(trainer):
        return _poison(trainer, "norm", (2, 3, 4, 5), gradient=True)

    trainer, _ = _build(tmp_path, spoil, checkpoint=True, bad_steps=BadStepsConfig(max_skipped_steps=3))
    _run(trainer)
    assert [record["step"] for record in read_records(tmp_path / "skipped.jsonl")] == [2, 3, 4]
    for bound in (3, 2, 0):
        bad_steps = BadStepsConfig(max_skipped_steps=bound)
        resumed, before = _build(
            tmp_path,
            spoil,
            checkpoint=True,
            bad_steps=bad_steps,
            training={"steps": 6},
            resume=True,
            metrics={"log_freq": 100},
        )
        message = _message(resumed)
        assert f"; 3 skipped before, [bad_steps] max_skipped_steps = {bound}. Training has stopped." in message
        assert message.startswith("step 5: the gradient of norm.weight is nan")
        after = parameters(resumed)
        assert all(torch.equal(before[0][name], after[name]) for name in after)


def test_a_weight_that_only_the_type_of_the_last_checkpoint_cannot_hold_is_not_saved(assets, tmp_path):
    saving = {"enable": True, "export_dtype": "float16", "last_save_model_only": True}
    trainer = make_config(tmp_path, checkpoint=saving, training={"steps": 1}).build()
    trainer.checkpointer.load(step=-1)
    trainer.step = 1
    trainer.train_step(trainer.batch_generator(trainer.dataloader))
    with torch.no_grad():
        trainer.model_parts[0].get_parameter("norm.weight")[3] = 1e5
    with pytest.raises(UserError, match=r"^step 1: the weight of norm.weight is inf .* torch.float16 "):
        trainer.checkpointer.save(1, last_step=True)
    assert not any((tmp_path / "checkpoint").glob("*"))
    trainer.close()


def test_a_weight_that_is_not_finite_is_not_saved(assets, tmp_path):
    trainer, _ = _build(tmp_path, checkpoint=True)
    update = trainer.optimizers.step

    def spoilt_update():
        update()
        if trainer.step == 4:
            with torch.no_grad():
                trainer.model_parts[0].get_parameter("layers.1.attention.wo.weight").view(-1)[5] = math.inf

    trainer.optimizers.step = spoilt_update
    assert _message(trainer) == (
        "step 4: the weight of layers.1.attention.wo.weight is inf after the update. Training has stopped. "
        f"The last checkpoint, {tmp_path}/checkpoint/step-2, is from before."
    )
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-2"]


@pytest.fixture
def deterministic():
    """The experts' backward pass on a CPU adds up in any order otherwise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("recipe", ["debug/nitp_debug", "debug/nitp_moe_debug"])
def test_a_skipped_step_leaves_out_its_update_and_nothing_else(assets, tmp_path, caplog, deterministic, recipe):
    caplog.set_level("INFO")
    # While the learning rate rises, each step has its own.
    sections = {"recipe": recipe, "lr_scheduler": {"warmup_steps": 4}}
    sections["geometry"] = {"enable": True, "interval": 2, "num_pairs": 8}
    trainer, spoilt = _build(
        tmp_path / "guarded",
        lambda trainer: _poison(trainer, "layers.2.attention.wo", (2,), gradient=True),
        bad_steps=BadStepsConfig(max_skipped_steps=1),
        **sections,
    )
    _run(trainer)
    assert len(spoilt) == 1

    by_hand, _ = _build(tmp_path / "by_hand", **sections)
    batches = by_hand.batch_generator(by_hand.dataloader)
    for step in (1, 2, 3, 4):
        by_hand.step = step
        if step == 2:
            next(batches)
            by_hand.lr_schedulers.step()
        else:
            by_hand.train_step(batches)
    by_hand.close()

    expected = parameters(by_hand)
    assert all(torch.equal(expected[name], value) for name, value in parameters(trainer).items())
    biases = [dict(run.model_parts[0].named_buffers()) for run in (trainer, by_hand)]
    names = [name for name in biases[0] if name.endswith(("expert_bias_E", "tokens_per_expert_E"))]
    assert bool(names) == ("moe" in recipe)
    assert all(torch.equal(biases[0][name], biases[1][name]) for name in names)
    ours, theirs = (read_records(tmp_path / name / "metrics.jsonl") for name in ("guarded", "by_hand"))
    assert [record["step"] for record in ours] == [1, 3, 4]
    for key in ("loss", "grad_norm", "lr"):
        assert [record[key] for record in ours] == [record[key] for record in theirs], key
    geometry = [read_records(tmp_path / name / "geometry.jsonl") for name in ("guarded", "by_hand")]
    assert geometry[0] == geometry[1] and [record["step"] for record in geometry[0]] == [1, 4]
    (skipped,) = read_records(tmp_path / "guarded/skipped.jsonl")
    assert skipped["step"] == 2
    assert skipped["reason"].startswith("step 2 skipped (1 of 1): the gradient of layers.2 is nan in ")
    assert [record.message for record in caplog.records].count(skipped["reason"]) == 1


def test_a_checkpoint_after_skipped_steps_alone_is_resumed_from(assets, tmp_path):
    """The optimizer has made no step then, and its checkpoint says so."""

    def spoil(trainer):
        return _poison(trainer, "norm", (1, 2), gradient=True)

    options = {"checkpoint": True, "bad_steps": BadStepsConfig(max_skipped_steps=2), "lr_scheduler": {"total_steps": 3}}
    stopped, _ = _build(tmp_path, spoil, training={"steps": 2}, **options)
    _run(stopped)
    resumed, _ = _build(tmp_path, training={"steps": 3}, resume=True, **options)
    _run(resumed)
    whole, _ = _build(tmp_path / "whole", spoil, training={"steps": 3}, **options)
    _run(whole)
    assert all(torch.equal(parameters(whole)[name], value) for name, value in parameters(resumed).items())
    counts = [value for name, value in resumed.optimizers.state_dict().items() if name.endswith(".step")]
    assert counts and all(value == 1 for value in counts)


def test_a_spike_is_skipped_by_its_norm_and_the_bound_counts_resumed_steps(assets, tmp_path):
    def spoil(trainer):
        return _poison(trainer, "norm", (2, 5), gradient=True, factor=1e3)

    bad_steps = BadStepsConfig(max_skipped_steps=1, skip_above=50.0)
    trainer, _ = _build(tmp_path, spoil, checkpoint=True, bad_steps=bad_steps)
    _run(trainer)
    assert _steps(tmp_path) == [1, 3, 4]
    (skipped,) = read_records(tmp_path / "skipped.jsonl")
    assert re.fullmatch(r"step 2 skipped \(1 of 1\): gradient norm \d{3,4}\.\d above 50", skipped["reason"])

    resumed, _ = _build(tmp_path, spoil, checkpoint=True, bad_steps=bad_steps, training={"steps": 6}, resume=True)
    message = _message(resumed)
    assert re.match(
        r"step 5: gradient norm \d{3,4}\.\d above 50; 1 skipped before, \[bad_steps\] max_skipped_steps = 1\. "
        r"Training has stopped\. "
        rf"The last checkpoint, {tmp_path}/checkpoint/step-4, is from before\.",
        message,
    ), message


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30])
def test_float8_with_zero_and_huge_hidden_states_trains_or_is_stopped(assets, tmp_path, factor):
    def spoil(trainer):
        return _poison(trainer, "norm", (2,), factor=factor)

    float8 = {"enable": True, "emulate": True, "filter_fqns": ["lm_head"]}
    trainer, _ = _build(tmp_path, spoil, float8=float8, training={"steps": 3})
    if factor > 1:
        assert _message(trainer).startswith("step 2: the ")
        assert all(value.isfinite().all() for value in parameters(trainer).values())
        return
    _run(trainer)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(math.isfinite(record[key]) for record in records for key in ("ntp_loss", "nitp_loss", "grad_norm"))
    # Without a direction the cosine is none.
    assert records[1]["nitp_loss"] == pytest.approx(1.0, rel=1e-6) or factor


def test_two_ranks_stop_at_once_and_name_the_bad_one(assets, tmp_path):
    (tmp_path / "bad_loss.py").write_text(
        "import os\nfrom nitp_titan.objectives.distances import cosine_loss\ncalls = 0\n\n\n"
        "def distance(prediction, target):\n"
        "    global calls\n"
        # It is tried on small tensors first.
        "    calls += prediction.shape[1] > 8\n"
        # Two steps of a micro-batch of two chunks; the first call of the third step is the fifth.
        "    bad = os.environ['RANK'] == '1' and calls == 5\n"
        "    return cosine_loss(prediction, target) * (float('nan') if bad else 1.0)\n"
    )
    start = time.monotonic()
    done = warm_ranks(
        2,
        "-m",
        "nitp_titan.train",
        *("--recipe", "debug/nitp_debug", "--nitp.loss", "bad_loss:distance", "--dump_folder", str(tmp_path / "run")),
        *("--training.local_batch_size", "2", "--training.global_batch_size", "4", "--training.steps", "100"),
        *("--checkpoint.interval", "2", "--validator.no-enable", "--metrics.log_freq", "100"),
        PYTHONPATH=str(tmp_path),
    )
    assert time.monotonic() - start < 120
    assert done.returncode == 1
    # The process says it, and torchrun's summary of each rank.
    line, *repeated = [line for line in done.stderr.splitlines() if "error: " in line]
    assert all(line.strip() in other for other in repeated)
    assert line.partition("error: ")[2].startswith("step 3: the nitp loss of rank 1 is nan (ntp ")
    assert line.endswith(f"The last checkpoint, {tmp_path}/run/checkpoint/step-2, is from before.")
    assert "nitp_titan/training/bad_steps.py" not in done.stderr and "Loss is not finite" not in done.stderr
    assert [path.name for path in (tmp_path / "run/checkpoint").glob("step-*")] == ["step-2"]


FINE = {"ntp": 1.5, "nitp": 0.25}


@pytest.mark.parametrize(
    "findings, expected",
    [
        # Losses are shares of one mean, and tensor-parallel ranks repeat them.
        ([FINE] * 2 + [{"ntp": 1.5, "nitp": NAN}] * 2, "the nitp loss of ranks 2, 3 is nan (ntp 3)"),
        ([FINE] * 3 + [{"ntp": math.inf, "nitp": 0.25}], "the ntp loss of rank 3 is inf (nitp 0.5)"),
        # Stages of a pipeline without a loss.
        ([{}, {}, FINE, {"ntp": NAN, "nitp": 0.25}], "the ntp loss of rank 3 is nan (nitp 0.5)"),
        ([{"ntp": NAN, "nitp": 0.25}] * 12, "the ntp loss of ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more is nan (nitp 3)"),
    ],
)
def test_the_first_bad_loss_is_told_from_the_shares_of_all_ranks(findings, expected):
    findings = [Finding(losses=losses) for losses in findings]
    shares = 12 if len(findings) == 12 else 2
    assert describe(findings, gradient=NAN, limit=math.inf, num_loss_shares=shares) == expected


def test_of_several_bad_gradients_the_one_nearest_to_the_loss_is_named():
    findings = [
        Finding(FINE, module=BadModule((0, 2), "layers.1", {"layers.1.attention.wq.weight": NAN})),
        Finding(FINE, backward=NAN, module=BadModule((0, 3), "layers.2", {"layers.2.attention.wq.weight": math.inf})),
        Finding(FINE),
    ]
    assert describe(findings, gradient=NAN, limit=math.inf, num_loss_shares=3) == (
        "the gradient of layers.2.attention.wq.weight is inf in the backward pass of rank 1 "
        "(the losses are finite: ntp 4.5, nitp 0.75)"
    )
    # One stage later in the pipeline, two tensors in the shards of two ranks, and nothing at the embeddings.
    later = [
        Finding(module=BadModule((0, 3), "layers.2", {"layers.2.attention.wq.weight": NAN})),
        Finding(FINE, module=BadModule((1, 1), "layers.5", {"layers.5.attention.wq.weight": NAN})),
        Finding(FINE, module=BadModule((1, 1), "layers.5", {"layers.5.attention.wk.weight": math.inf})),
    ]
    assert describe(later, gradient=NAN, limit=math.inf, num_loss_shares=2).startswith(
        "the gradient of layers.5 is nan, summed over ranks (the losses are finite: ntp 3, "
    )


def test_gradients_whose_common_norm_alone_overflows_are_bad():
    assert describe([Finding(FINE)], gradient=math.inf, limit=math.inf, num_loss_shares=1) == (
        "the global gradient norm is inf (the losses are finite: ntp 1.5, nitp 0.25)"
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_skipped_steps": -1}, "[bad_steps] max_skipped_steps = -1, but it must be at least 0."),
        (
            {"max_skipped_steps": 1, "skip_above": 0.0},
            "[bad_steps] skip_above = 0.0, but it must be a finite number above 0, or 'none'.",
        ),
        (
            {"max_skipped_steps": 1, "skip_above": NAN},
            "[bad_steps] skip_above = nan, but it must be a finite number above 0, or 'none'.",
        ),
        (
            {"skip_above": 10.0},
            "[bad_steps] skip_above = 10.0, but it must be 'none' while max_skipped_steps = 0 skips no step.",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError) as error:
        BadStepsConfig(**settings)
    assert str(error.value) == message
