"""Families and variants: refusals with their reasons, a forward of one's own, and a package outside this project."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import make_config, train
from processes import PROJECT, warm_python, warm_ranks
from torchtitan.models import deepseek_v3, kimi_k2_7, llama3, muse_glimmer
from torchtitan.models.llama3 import Llama3Model
from transformers import AutoConfig

from nitp_titan.errors import UserError
from nitp_titan.models import build_model_spec, FAMILIES
from nitp_titan.models.settings import ModelConfig
from nitp_titan.objectives.decoder import NITPDecoder
from nitp_titan.objectives.settings import NITPConfig
from nitp_titan.objectives.variant import with_nitp
from nitp_titan.step_files import read_records

SETTINGS = NITPConfig(weight=1.0, target_layer=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_flavors_of_every_family_build_on_the_meta_device(family):
    from importlib import import_module

    debug = [flavor for flavor in import_module(f"nitp_titan.models.{family}").FLAVORS if flavor.startswith("debug")]
    for flavor in debug:
        spec = build_model_spec(ModelConfig(family=family, flavor=flavor))
        with torch.device("meta"):
            stock, ours = (
                [name for name, _ in each.model.build().named_parameters()]
                for each in (spec, with_nitp(spec, SETTINGS))
            )
        assert ours == stock + [f"nitp.projector.{name}.weight" for name in ("w1", "w2", "w3")]


@pytest.mark.parametrize("name", ["qwen3_debug", "qwen3_moe_debug", "deepseek_v3_debug", "gpt_oss_debug"])
def test_the_debug_recipe_of_a_family_learns_on_one_rank(assets, tmp_path, name):
    training = {"steps": 30, "max_norm": 1.0}
    train(make_config(tmp_path, recipe=f"debug/nitp_{name}", training=training, lr_scheduler={"warmup_steps": 5}))
    records = read_records(tmp_path / "metrics.jsonl")
    assert records[0]["nitp_loss"] == pytest.approx(1.0, abs=0.05)
    assert records[-1]["ntp_loss"] < records[0]["ntp_loss"] - 0.8
    assert records[-1]["nitp_loss"] < 0.5 * records[0]["nitp_loss"]


@pytest.mark.parametrize("family", [kimi_k2_7, muse_glimmer])
def test_a_family_with_its_own_forward_is_refused_with_what_to_implement(family):
    spec = family.model_registry("debugmodel")
    # For NTP the layers are what is asked for, as train_configs/cpu.toml does.
    message = r"^\[geometry\] layers = true .*overrides Decoder.forward.*--geometry.no-layers"
    with pytest.raises(UserError, match=message) as refused:
        with_nitp(spec, NITPConfig())
    assert (refused.value.table, refused.value.key) == ("geometry", "layers")
    with pytest.raises(
        UserError, match=r"overrides Decoder.forward.*Implement a subclass of nitp_titan.objectives.decoder.NITPDecoder"
    ):
        with_nitp(spec, SETTINGS)


def test_multi_token_prediction_layers_are_refused_with_the_reason():
    spec = deepseek_v3.model_registry("debugmodel", num_mtp_layers=1)
    with pytest.raises(UserError, match=r"multi-token prediction layers, whose loss \(MTPLoss\)"):
        with_nitp(spec, SETTINGS)
    with_nitp(deepseek_v3.model_registry("debugmodel"), SETTINGS)


class _DoubledDecoder(NITPDecoder):
    def forward(self, tokens, z_BLD=None, positions=None, attention_masks=None):
        return "captured"


class _Doubled(Llama3Model):
    """A family with a forward of its own that says how NITP goes into it."""

    nitp_decoder = _DoubledDecoder

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        pass

    def forward(self, tokens, positions=None, attention_masks=None):
        return "plain"


class _Again(_Doubled):
    """Its forward is newer than the decoder that it inherits."""

    @dataclass(kw_only=True, slots=True)
    class Config(_Doubled.Config):
        pass

    def forward(self, tokens, positions=None, attention_masks=None):
        return "again"


def _of(cls):
    import dataclasses

    spec = llama3.model_registry("debugmodel")
    fields = {field.name: getattr(spec.model, field.name) for field in dataclasses.fields(spec.model)}
    return dataclasses.replace(spec, model=cls.Config(**fields))


def test_a_family_with_its_own_forward_names_its_decoder():
    with torch.device("meta"):
        model = with_nitp(_of(_Doubled), SETTINGS).model.build()
    assert model(None) == "captured"
    with pytest.raises(UserError, match="_Again overrides Decoder.forward"):
        with_nitp(_of(_Again), SETTINGS)


@pytest.mark.parametrize(
    "name, message",
    [
        ("lama3", "'lama3' is neither registered nor an importable module. Did you mean 'llama3'?"),
        ("no.such.package", "'no.such.package' is neither registered nor an importable module"),
        ("json", "the module has no FLAVORS and no model_registry"),
        ("", "'' is neither registered"),
    ],
)
def test_a_family_that_cannot_be_had_is_one_line(name, message):
    with pytest.raises(UserError) as caught:
        build_model_spec(ModelConfig(family=name, flavor="debug"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "cosin",
            "[nitp] loss = 'cosin', but it must be one of cosine, mse, smooth_l1, kl or module:function. "
            "Did you mean 'cosine'?",
        ),
        ("no_such_package:loss", "[nitp] loss = 'no_such_package:loss' cannot be imported: No module named"),
        (":loss", "[nitp] loss = ':loss' cannot be imported: Empty module name"),
        ("json:__name__", "[nitp] loss = 'json:__name__' is not a function"),
        ("json:loss", "[nitp] loss = 'json:loss' cannot be imported: module 'json' has no attribute 'loss'"),
    ],
)
def test_a_loss_that_cannot_be_had_is_one_line(tmp_path, name, message):
    with pytest.raises(UserError) as caught:
        make_config(tmp_path, nitp={"loss": name})
    assert message in str(caught.value)


EXAMPLE = PROJECT / "tests/my_variant"


def test_a_package_outside_of_this_one_trains_from_a_folder_of_its_own(assets, tmp_path):
    """The example of nitp_titan/README.md."""
    files = [path.relative_to(EXAMPLE.parent) for path in (*EXAMPLE.glob("*.py"), *EXAMPLE.glob("recipes/*.toml"))]
    shutil.copytree(EXAMPLE, tmp_path / "my_variant", ignore=shutil.ignore_patterns("__pycache__"))
    losses = {}
    for variant in ("ntp", "nitp"):
        run = tmp_path / "runs" / variant
        done = warm_ranks(
            1,
            "-m",
            "nitp_titan.train",
            *("--recipe", str(tmp_path / f"my_variant/recipes/{variant}.toml"), "--training.steps", "3"),
            *("--dump_folder", str(run), "--metrics.log_freq", "1", "--checkpoint.keep_latest_k", "0"),
            PYTHONPATH=str(tmp_path),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses[variant] = read_records(run / "metrics.jsonl")
        resolved = json.loads((run / "resolved.json").read_text())
        assert resolved["model"]["family"] == "my_variant"
    assert [record["step"] for record in losses["nitp"]] == [1, 2, 3]
    assert losses["nitp"][0]["ntp_loss"] == losses["ntp"][0]["ntp_loss"]
    # The angle between random directions is a quarter turn.
    assert losses["nitp"][0]["nitp_loss"] == pytest.approx(0.5, abs=0.02)
    assert "nitp_loss" not in losses["ntp"][0]
    command = ["scripts/export_hf.py", "--checkpoint", str(tmp_path / "runs/nitp"), "--out", str(tmp_path / "hf")]
    done = warm_python(*command, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert AutoConfig.from_pretrained(tmp_path / "hf").intermediate_size == 384
    assert sum(len(Path(tmp_path / name).read_text().splitlines()) for name in files) < 60
