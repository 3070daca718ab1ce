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
FIGURES = ("effective_rank", "rankme", "participation_ratio", "cosine", "cosine_sampled")


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
    (events,) = folder.glob("tb/*/events*")
    found = EventAccumulator(str(events.parent)).Reload()
    tags = set(found.Tags()["scalars"])
    assert {f"geometry/{state}/{figure}" for state in STATES for figure in FIGURES} < tags
    assert {f"probe/{state}/{figure}" for state in STATES for figure in FIGURES} < tags
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
    assert told["summary"]["probe/hidden/cosine"] != 0


def test_the_recipe_names_the_run_unless_the_train_config_does(tmp_path, files):
    metrics = config_registry.load("debug/ntp_debug@cpu").metrics
    assert (metrics.run_name, metrics.run_group) == ("debug/ntp_debug", "llama3 debug")
