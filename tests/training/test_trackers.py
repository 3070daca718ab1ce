"""TensorBoard and Weights & Biases, offline."""

import json

import pytest
import wandb
from helpers import make_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from nitp_titan import config_registry

STATES = ("hidden", "target", "projected")
TOKENS = {"HF_TOKEN": "hf_sentinelsentinelsentinel", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
STATS = ("effective_rank", "rankme", "participation_ratio", "cosine", "cosine_sampled")


@pytest.fixture(scope="module")
def tracked(assets, tmp_path_factory):
    """Two steps with a validation under both trackers: the run folder, and what Weights & Biases was told."""
    folder = tmp_path_factory.mktemp("tracked")
    names = config_registry.load("debug/nitp_debug@cpu").metrics
    validator = make_config(folder, generated_data=False).validator
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("WANDB_RUN_NAME", "WANDB_RUN_GROUP"):
            patch.delenv(variable, raising=False)
        for variable, value in TOKENS.items():
            patch.setenv(variable, value)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        config = make_config(
            folder,
            generated_data=False,
            training={"steps": 2, "global_batch_size": 4},
            geometry={"enable": True, "interval": 2},
            metrics={"enable_tensorboard": True, "enable_wandb": True, "run_name": names.run_name},
            validator={"enable": True, "freq": 2, "steps": 1, "dataloader": validator.dataloader},
        )
        trainer = config.build()
        told = {"name": wandb.run.name, "group": wandb.run.group, "offline": wandb.run.settings._offline}
        told["weight"] = wandb.run.config["nitp"]["weight"]
        trainer.train()
        told["summary"] = dict(wandb.run.summary)
        trainer.close()
    return folder, told


def test_tensorboard_has_grouped_tags_and_the_paper_s_figures_as_a_layout(tracked):
    folder, _ = tracked
    (events,) = folder.glob("tb/events*")
    found = EventAccumulator(str(events.parent)).Reload()
    tags = set(found.Tags()["scalars"])
    assert {f"geometry/{state}/{stat}" for state in STATES for stat in STATS} < tags
    assert {f"validation_geometry/{state}/{stat}" for state in STATES for stat in STATS} < tags
    assert {"loss_metrics/ntp_loss", "loss_metrics/nitp_loss", "validation_metrics/loss"} < tags
    assert [event.step for event in found.Scalars("geometry/hidden/effective_rank")] == [1, 2]
    (record, _) = map(json.loads, (folder / "geometry.jsonl").read_text().splitlines())
    value = found.Scalars("geometry/hidden/effective_rank")[0].value
    assert value == pytest.approx(record["hidden"]["effective_rank"], rel=1e-6)
    layout = layout_pb2.Layout()
    layout.ParseFromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert [title.partition(":")[0] for title in charts] == ["Figure 1", "Figure 1", "Figure 5", "NTP loss"]
    assert {tag for shown in charts.values() for tag in shown} <= tags


def test_no_token_of_the_environment_is_in_the_run_folder(tracked):
    folder, _ = tracked
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 6 and not any(token.encode() in content for token in TOKENS.values() for content in written)


def test_weights_and_biases_works_offline_with_name_group_and_config_of_the_recipe(tracked):
    folder, told = tracked
    assert told["offline"] and list(folder.glob("tb/*/wandb/offline-run-*"))
    assert (told["name"], told["group"], told["weight"]) == ("debug/nitp_debug", "llama3 debug", 1.0)
    assert told["summary"]["geometry/hidden/effective_rank"] > 1
    assert told["summary"]["validation_geometry/hidden/cosine"] != 0


def test_the_recipe_names_the_run_unless_the_train_config_does(tmp_path, files):
    metrics = config_registry.load("debug/ntp_debug@cpu").metrics
    assert (metrics.run_name, metrics.run_group) == ("debug/ntp_debug", "llama3 debug")


@pytest.fixture
def resumed(assets, tmp_path, monkeypatch):
    """A run with a checkpoint after step 2 that was killed after step 4, and went on from there to step 5."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for variable in ("WANDB_RUN_ID", "WANDB_RESUME"):
        # Ours to set, and monkeypatch's to put back.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    ids = []
    for steps in ([1, 2, 3, 4], [3, 4, 5]):
        # Each start is a process of its own.
        monkeypatch.delenv("WANDB_RUN_ID", raising=False)
        trainer = make_config(
            tmp_path,
            training={"steps": 5},
            metrics={"enable_tensorboard": True, "enable_wandb": True},
            checkpoint={"enable": True, "interval": 2},
        ).build()
        trainer.checkpointer.load(step=-1)
        ids.append((wandb.run.id, wandb.run.settings.resume))
        batches = trainer.batch_generator(trainer.dataloader)
        for step in steps:
            trainer.step = step
            trainer.train_step(batches)
            if step == 2:
                trainer.checkpointer.save(step)
        trainer.close()
    return tmp_path, ids


def test_a_run_that_resumes_is_one_run_for_both_trackers_and_tensorboard_has_each_step_once(resumed):
    folder, ids = resumed
    assert ids[0] == ids[1] and ids[0][0] and ids[0][1] == "allow"
    files = sorted(folder.glob("tb/events*"))
    assert len(files) == 2
    found = EventAccumulator(str(folder / "tb")).Reload()
    assert [event.step for event in found.Scalars("loss_metrics/ntp_loss")] == [1, 2, 3, 4, 5]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [event.value for event in found.Scalars("loss_metrics/ntp_loss")]
    assert losses == pytest.approx([record["ntp_loss"] for record in records], rel=1e-6)
