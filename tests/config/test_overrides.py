"""Runs with a parameter that an override adds: saved, resumed, and never exported without it."""

import dataclasses

import pytest
import torch
from helpers import export_of, make_config, parameters, saved_run

from nitp_titan.errors import UserError
from nitp_titan.machine.cpu import DENSE_ATTENTION

GATED = {"override": {"imports": [DENSE_ATTENTION, "odd_overrides.gated"]}, "generated_data": False}
GATE = "layers.1.feed_forward.gate.weight"


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gated") / "run"
    return folder, saved_run(folder, **GATED)


def test_a_run_resumes_from_its_checkpoint(run):
    folder, before = run
    config = make_config(folder, **GATED, training={"steps": 4}, resume=True)
    resumed = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, enable=True)).build()
    resumed.checkpointer.load(step=-1)
    resumed.close()
    assert resumed.step == 3 and GATE in parameters(resumed)
    assert all(torch.equal(value, parameters(resumed)[name]) for name, value in parameters(before).items())


def test_a_checkpoint_without_the_parameter_is_refused_before_anything_is_built(run, tmp_path):
    with pytest.raises(UserError, match=rf"step-3 has a tensor '{GATE}', for which the model has no place"):
        load = {"enable": True, "initial_load_path": str(run[0])}
        make_config(tmp_path, generated_data=False, checkpoint=load).build()


def test_an_export_would_leave_it_out_and_is_refused(run):
    with pytest.raises(UserError, match=f"no exact home in LlamaForCausalLM: '{GATE}' has no counterpart there"):
        export_of(run[0])


def test_an_export_at_the_end_is_refused_at_the_start(assets, tmp_path):
    saving = {"enable": True, "last_save_model_only": True, "last_save_in_hf": True}
    with pytest.raises(UserError, match=rf"^\[checkpoint\] last_save_in_hf = true, but .* '{GATE}' has no counterpart"):
        make_config(tmp_path, **GATED, checkpoint=saving).build()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "nitp_titan.machine.cpu.dense_flex_atention",
            r"names no registered @override. Did you mean 'nitp_titan.machine.cpu",
        ),
        ("no_such_module.x", r"module 'no_such_module' could not be imported"),
        (("odd_overrides.gated", {"width": 3}), r"gated\(\) got an unexpected keyword argument 'width'"),
    ],
)
def test_an_override_that_is_not_there_or_does_not_fit_is_one_line(assets, tmp_path, entry, message):
    with pytest.raises(UserError, match=rf"^\[override\] imports: .*{message}"):
        make_config(tmp_path, override={"imports": [DENSE_ATTENTION, entry]}).build()
