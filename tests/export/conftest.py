"""Saved runs of every family, shared by the tests of the export."""

import json

import pytest
from exported import TRAINING
from helpers import saved_run, with_expert_bias, without_expert_bias

from nitp_titan.models.settings import ModelConfig


@pytest.fixture(scope="package")
def runs(assets, tmp_path_factory):
    """Saved runs by model, each trained when it is first asked for: (folder, trainer)."""
    made = {}
    text = tmp_path_factory.mktemp("text") / "paragraphs.jsonl"
    documents = [json.loads(line)["text"] for line in (assets / "validation.jsonl").read_text().splitlines()]
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n\n")]
    text.write_text("".join(json.dumps({"text": paragraph[:200]}) + "\n" for paragraph in paragraphs))

    def run(model: str):
        if model not in made:
            family, _, flavor = model.partition("/")
            folder = tmp_path_factory.mktemp("run")
            zeroed = model in ("qwen3/debug_moe", "gpt_oss/debug", "odd_models/gpt_oss_yarn")
            settings = {
                "model": ModelConfig(family=family, flavor=flavor),
                "training": TRAINING,
                "generated_data": False,
                "dataloader": {"dataset_path": str(text)},
                "nitp": {"weight": 20.0},
            }
            change = without_expert_bias if zeroed else with_expert_bias
            made[model] = folder, saved_run(folder, change=change, **settings)
        return made[model]

    return run
