"""Whole training runs of one rank: off means off, fair variants, counts, resume, metrics."""

import dataclasses
import json

import pytest
import torch
from helpers import make_config, PackedDataLoader, parameters, train
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.trainer import Trainer

from nitp_titan.errors import UserError
from nitp_titan.machine import cpu
from nitp_titan.step_files import read_records


def _stock(config) -> Trainer:
    """TorchTitan's own trainer, loss and metrics with the settings of our config."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(Trainer.Config)}
    fields["metrics"] = MetricsProcessor.Config(log_freq=1)
    if cpu.active():
        torch.compiler.set_stance("force_eager")
        fields["model_spec"] = cpu.with_gloo_reduction(config.model_spec)
    return Trainer.Config(**fields)


@pytest.mark.parametrize("recipe", ["debug/nitp_debug", "debug/ntp_debug"])
def test_off_means_torchtitan_bit_for_bit(assets, tmp_path, recipe):
    """Weight 0 and no [nitp] at all: stock losses, gradients, weights and checkpoint keys."""
    off = make_config(tmp_path / "off", recipe=recipe, nitp={"weight": 0.0})
    stock_trainer, off_trainer = train(_stock(make_config(tmp_path / "stock", recipe=recipe))), train(off)
    assert type(off_trainer.model_parts[0]).__mro__[1:] == type(stock_trainer.model_parts[0]).__mro__[1:]
    assert type(off_trainer.loss_fn) is type(stock_trainer.loss_fn)
    for gradients in (True, False):
        stock, ours = (parameters(trainer, gradients=gradients) for trainer in (stock_trainer, off_trainer))
        assert stock.keys() == ours.keys()
        for name in stock:
            assert torch.equal(stock[name], ours[name]), name
    assert not any("nitp" in name for name in off_trainer.model_parts[0].state_dict())
    assert off_trainer.optimizers.state_dict().keys() == stock_trainer.optimizers.state_dict().keys()


class _Recording(PackedDataLoader):
    """The stdlib loader with a record of every batch."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(PackedDataLoader.Config):
        inner: object = None

    seen: list = []

    def __init__(self, config, **kwargs):
        self.inner = config.inner.build(**kwargs)

    def __iter__(self):
        for inputs, labels in self.inner:
            self.seen.append((inputs["input"].clone(), inputs["positions"].clone(), labels.clone()))
            yield inputs, labels


def test_both_variants_start_from_the_same_weights_and_see_the_same_batches(assets, tmp_path):
    variants = {}
    for recipe in ("debug/ntp_debug", "debug/nitp_debug"):
        _Recording.seen = []
        config = make_config(tmp_path / recipe, recipe=recipe, generated_data=False)
        config = dataclasses.replace(config, dataloader=_Recording.Config(inner=config.dataloader))
        trainer = config.build()
        start = parameters(trainer)
        batches = trainer.batch_generator(trainer.dataloader)
        for step in range(1, 4):
            trainer.step = step
            trainer.train_step(batches)
        trainer.close()
        variants[recipe] = start, _Recording.seen, parameters(trainer)
    (ntp_start, ntp_batches, ntp_end), (nitp_start, nitp_batches, nitp_end) = variants.values()
    assert ntp_start.keys() == {name for name in nitp_start if not name.startswith("nitp.")}
    assert all(torch.equal(ntp_start[name], nitp_start[name]) for name in ntp_start)
    assert len(ntp_batches) == len(nitp_batches) == 3
    for ntp_batch, nitp_batch in zip(ntp_batches, nitp_batches):
        assert all(torch.equal(a, b) for a, b in zip(ntp_batch, nitp_batch))
    assert any(not torch.equal(ntp_end[name], nitp_end[name]) for name in ntp_end)


def test_accumulation_and_log_interval_leave_the_figures_as_they_are(assets, tmp_path):
    """Four passes of one sequence equal one pass of four; a log interval of 2 shows every second line."""
    runs = {
        "one pass": {},
        "four passes": {"training": {"local_batch_size": 1, "steps": 4}},
        "every second": {"training": {"local_batch_size": 1, "steps": 4}, "metrics": {"log_freq": 2}},
    }
    records, gradients = {}, {}
    for name, sections in runs.items():
        sections = {"training": {"steps": 4}, "nitp": {"weight": 20.0}, **sections}
        trainer = train(make_config(tmp_path / name, **sections))
        records[name] = {record["step"]: record for record in read_records(tmp_path / name / "metrics.jsonl")}
        gradients[name] = parameters(trainer, gradients=True)
    assert list(records["one pass"]) == list(records["four passes"]) == [1, 2, 3, 4]
    assert list(records["every second"]) == [1, 2, 4]
    for step, record in records["one pass"].items():
        for key in ("ntp_loss", "nitp_loss", "loss", "grad_norm"):
            assert records["four passes"][step][key] == pytest.approx(record[key], rel=1e-4)
        assert records["four passes"][step]["tokens"] == record["tokens"] == step * 4 * 128
        assert record["loss"] == pytest.approx(record["ntp_loss"] + 20.0 * record["nitp_loss"], rel=1e-5)
    for record in [record for run in records.values() for record in run.values()]:
        assert record["seconds_per_step"] * record["tokens_per_second"] == pytest.approx(4 * 128)
    for step, record in records["every second"].items():
        same = ("ntp_loss", "nitp_loss", "loss", "grad_norm", "lr", "tokens")
        assert {key: record[key] for key in same} == {key: records["four passes"][step][key] for key in same}
    for name, gradient in gradients["one pass"].items():
        # After four steps of Adam the order of summation shows in single elements.
        assert (gradients["four passes"][name] - gradient).norm() < 1e-3 * gradient.norm(), name


def test_the_logged_losses_are_averages_over_the_trained_positions(assets, tmp_path):
    """Against a loop over positions with the initial weights: lr 0 keeps them."""
    config = make_config(tmp_path, training={"steps": 2, "local_batch_size": 2})
    group = config.optimizer.param_groups[0]
    frozen = dataclasses.replace(group, optimizer_kwargs={**group.optimizer_kwargs, "lr": 1e-30})
    trainer = train(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, param_groups=[frozen])))
    record = read_records(tmp_path / "metrics.jsonl")[1]
    model = trainer.model_parts[0]
    loader = PackedDataLoader(PackedDataLoader.Config(), dp_world_size=1, dp_rank=0, seq_len=128, local_batch_size=4)
    batches = iter(loader)
    next(batches)
    inputs, labels = next(batches)
    tokens, positions = inputs["input"], inputs["positions"]
    h, z, _, _ = model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions=positions))
    ntp, nitp = [], []
    for row in range(4):
        for t in range(128):
            if labels[row, t] == -100:
                continue
            ntp.append(-model.lm_head(h[row, t]).log_softmax(-1)[labels[row, t]].item())
            if t + 1 < 128 and positions[row, t + 1] == positions[row, t] + 1:
                cosine = torch.cosine_similarity(model.nitp.projector(h[row, t]), z[row, t + 1], dim=0)
                nitp.append(1 - cosine.item())
    assert record["ntp_loss"] == pytest.approx(sum(ntp) / len(ntp), rel=1e-5)
    assert record["nitp_loss"] == pytest.approx(sum(nitp) / len(nitp), rel=1e-5)


def _checkpointed(folder, steps: int):
    return make_config(
        folder,
        generated_data=False,
        training={"steps": steps},
        lr_scheduler={"total_steps": 6},
        checkpoint={"enable": True, "interval": 3, "last_save_model_only": False, "keep_latest_k": 0},
        metrics={"enable_tensorboard": True},
    )


def test_a_resumed_run_continues_bit_for_bit_and_logs_each_step_once(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("torchtitan.trainer.time.sleep", lambda seconds: None)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ends = []
    for folder, lengths in ((whole, [6]), (broken, [5, 6])):
        for steps in lengths:
            if steps == 6 and folder == broken:
                # As if the run had been killed after step 5, with its last line cut short.
                with (folder / "metrics.jsonl").open("a") as metrics:
                    metrics.write('{"step": 6, "ntp_lo')
                torch_checkpoint = folder / "checkpoint/step-5"
                torch_checkpoint.rename(tmp_path / "lost")
            trainer = dataclasses.replace(_checkpointed(folder, steps), resume=folder == broken).build()
            trainer.train()
            trainer.close()
        ends.append(parameters(trainer))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    records = [read_records(folder / "metrics.jsonl") for folder in (whole, broken)]
    assert [record["step"] for record in records[1]] == [1, 2, 3, 4, 5, 6]
    for key in ("ntp_loss", "nitp_loss", "loss", "grad_norm", "lr", "tokens"):
        assert [record[key] for record in records[0]] == [record[key] for record in records[1]], key
    assert list((whole / "tb").rglob("events.*"))


def test_metrics_reach_tensorboard_and_wandb(assets, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = make_config(tmp_path, training={"steps": 1}, metrics={"enable_tensorboard": True, "enable_wandb": True})
    trainer = config.build()
    seen = []
    container, tensorboard, *_ = trainer.metrics_processor.logger._loggers[0]._loggers
    loggers = [*container._loggers, tensorboard]
    assert [type(entry).__name__ for entry in loggers] == ["WandBLogger", "TensorBoard"]
    for entry in loggers:
        monkeypatch.setattr(entry, "log", lambda metrics, step: seen.append(metrics))
    trainer.step = 1
    trainer.train_step(trainer.batch_generator(trainer.dataloader))
    trainer.close()
    assert len(seen) == 2
    for metrics in seen:
        assert {"loss_metrics/ntp_loss", "loss_metrics/nitp_loss", "loss_metrics/global_avg_loss"} <= metrics.keys()


def test_the_console_line_names_both_losses_and_the_time_left(assets, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(make_config(tmp_path, training={"steps": 2}))
    lines = [record.message for record in caplog.records if record.message.startswith("step")]
    assert len(lines) == 2 and "step: " not in caplog.text
    for word in ("step 2/2", "ntp ", "nitp ", "grad_norm ", "lr ", "tokens 1,024", "tok/s", "GiB", "left 0s"):
        assert word in lines[1], word


def test_validation_reports_plain_cross_entropy(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("torchtitan.trainer.time.sleep", lambda seconds: None)
    values = {}
    for name, weight in (("ntp", 0.0), ("nitp", 1.0)):
        config = make_config(
            tmp_path / name,
            generated_data=False,
            nitp={"weight": weight},
            training={"steps": 1},
            validator={"enable": True, "freq": 1, "steps": 2},
            optimizer={},
        )
        group = config.optimizer.param_groups[0]
        frozen = dataclasses.replace(group, optimizer_kwargs={**group.optimizer_kwargs, "lr": 1e-30})
        config.optimizer.param_groups[:] = [frozen]
        trainer = config.build()
        trainer.train()
        trainer.close()
        (values[name],) = read_records(tmp_path / name / "validation.jsonl")
    assert values["ntp"] == values["nitp"]
    assert values["ntp"].keys() == {"step", "ntp_loss"}


def test_a_vocabulary_that_the_model_does_not_have_is_refused(assets, tmp_path):
    from tokenizers import Tokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text((assets / "tokenizer_config.json").read_text())
    config = dataclasses.replace(make_config(tmp_path), hf_assets_path=str(folder))
    with pytest.raises(UserError, match="4097 tokens, more than the model's vocabulary of 4096"):
        config.build()


def test_float8_converts_the_projector_unless_it_is_filtered(assets, tmp_path):
    from torchtitan.components.quantization.float8 import Float8Linear

    def converted(**float8):
        config = make_config(tmp_path / str(len(float8)), training={"steps": 1}, float8=float8)
        trainer = train(config)
        assert not any(config.model_spec.model.traverse(Float8Linear.Config))
        assert json.loads((tmp_path / str(len(float8)) / "metrics.jsonl").read_text())["nitp_loss"] > 0
        return {name for name, module in trainer.model_parts[0].named_modules() if isinstance(module, Float8Linear)}

    every = converted(enable=True, emulate=True)
    backbone = converted(enable=True, emulate=True, filter_fqns=["lm_head", "nitp.projector"])
    assert every - backbone == {"nitp.projector.w1", "nitp.projector.w2", "nitp.projector.w3"}
    assert "lm_head" not in every and "layers.0.feed_forward.w1" in backbone


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(assets, tmp_path, mode):
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

    policy = {"selective": SelectiveAC, "full": FullAC}[mode].Config()
    plain = make_config(tmp_path / "plain", training={"steps": 1})
    checkpointed = dataclasses.replace(plain, activation_checkpoint=policy, dump_folder=str(tmp_path / mode))
    expected, ours = (parameters(train(config), gradients=True) for config in (plain, checkpointed))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name.replace("_checkpoint_wrapped_module.", "")])
