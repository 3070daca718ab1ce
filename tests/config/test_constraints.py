"""Ranges of settings: choices that upstream has, and limits that flags meet too."""

import dataclasses

import pytest
from helpers import make_config
from torchtitan.components.optimizer import ParamGroupConfig

from nitp_titan.config.constraints import CONSTRAINTS, OPTIMIZER_CONSTRAINTS
from nitp_titan.config.refusals import upstream_refusals
from nitp_titan.errors import UserError


def test_every_setting_with_a_range_exists(tmp_path):
    config = make_config(tmp_path, generated_data=False)
    for table, ranges in CONSTRAINTS.items():
        if table == "activation_checkpoint":
            # Of several policies, each with settings of its own.
            from torchtitan.distributed.activation_checkpoint import MemoryBudgetAC, SelectiveAC

            names = {f.name for policy in (MemoryBudgetAC, SelectiveAC) for f in dataclasses.fields(policy.Config)}
        else:
            section = config
            for name in table.split("."):
                section = getattr(section, name)
            names = {field.name for field in dataclasses.fields(section)}
        assert set(ranges) <= names, table


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("training", {"steps": 2**31}, r"\[training\] steps = 2147483648, but it must be an integer of at most"),
        ("debug", {"seed": 10**30}, r"\[debug\] seed = an integer of 100 bits, but it must be an integer of at most"),
        ("training", {"max_norm": float("nan")}, r"\[training\] max_norm = nan, but it must be a finite number"),
        ("metrics", {"save_tb_folder": " "}, r"\[metrics\] save_tb_folder = ' ', but it must be a text that is not"),
        ("compile", {"components": ["modle"]}, r"components = \['modle'\], but .* Did you mean 'model'\?"),
        ("compile", {"backend": "inducktor"}, r"backend = 'inducktor', but .* Did you mean 'inductor'\?"),
        (
            "profiler",
            {"profiler_warmup": 30},
            r"\[profiler\] profile_freq = 10, but it must be at least",
        ),
        (
            "lr_scheduler",
            {"total_steps": 2},
            r"\[lr_scheduler\] total_steps = 2, but it must be at least \[training\] steps = 3: after its end the "
            r"schedule's learning rates are below 0\.",
        ),
        (
            "nitp",
            {"projector_width": 0.005},
            r"\[nitp\] projector_width = 0\.005, but it must be at least 0\.01, one hidden unit of the projector",
        ),
        (
            "optimizer",
            {"param_groups": [ParamGroupConfig(pattern=".*", optimizer_name="DistMuon")]},
            r"\[optimizer\] optimizer_name = 'DistMuon', but it must be one of 'AdamW', 'Adam'\.",
        ),
        ("validator", {"steps": 0}, r"\[validator\] steps = 0, but it must be at least 1, or -1"),
        ("comm", {"train_timeout_seconds": 0}, r"\[comm\] train_timeout_seconds = 0, but it must be at least 1"),
        ("checkpoint", {"exclude_from_loading": ["optimiser"]}, r"Did you mean 'optimizer'\?"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_wherever_it_comes_from(tmp_path, section, changes, message):
    with pytest.raises(UserError, match=message):
        make_config(tmp_path, **{section: changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer_name": "AdamV"}, r"optimizer_name = 'AdamV', but .* Did you mean 'Adam'\?"),
        ({"pattern": "("}, r"\[optimizer\] pattern = '\(', but it must be a regular expression"),
        ({"optimizer_kwargs": {"lrr": 1e-3}}, r"AdamW has no setting 'lrr'. Did you mean 'lr'\?"),
        ({"optimizer_kwargs": {"lr": "fast"}}, r"\[optimizer\] lr = 'fast', but it must be above 0"),
        ({"optimizer_kwargs": {"betas": 0.9}}, r"\[optimizer\] betas = 0.9, but it must be two numbers"),
    ],
)
def test_a_group_of_parameters_that_no_optimizer_takes_is_refused(tmp_path, change, message):
    config = make_config(tmp_path)
    (group,) = config.optimizer.param_groups
    assert set(OPTIMIZER_CONSTRAINTS) <= set(group.optimizer_kwargs)
    with pytest.raises(UserError, match=message):
        make_config(tmp_path, optimizer={"param_groups": [dataclasses.replace(group, **change)]})
    with pytest.raises(UserError, match=r"param_groups = \[\], but it must be a list of at least one group"):
        make_config(tmp_path, optimizer={"param_groups": []})


def _groups(*patterns):
    settings = {"lr": 1e-3}
    groups = [ParamGroupConfig(pattern=p, optimizer_name="AdamW", optimizer_kwargs=settings) for p in patterns]
    return {"param_groups": groups}


@pytest.mark.parametrize(
    ("sections", "table", "message"),
    [
        # Raised, and asserted, in two places of TorchTitan.
        ({"optimizer": _groups("nothing", ".*")}, "optimizer", r"^\[optimizer\] .* 'nothing' matched no parameters$"),
        ({"optimizer": _groups("norm")}, "optimizer", r"^\[optimizer\] Parameter mismatch: \d+ trainable params in"),
        ({"parallelism": {"pipeline_parallel_microbatch_size": 0}}, "parallelism", r"^parallelism\.pipeline_parallel"),
    ],
)
def test_what_torchtitan_refuses_of_the_settings_is_one_line_with_its_table(
    assets, tmp_path, caplog, sections, table, message
):
    with pytest.raises(UserError, match=message) as refused, upstream_refusals():
        make_config(tmp_path, nitp={"start_step": 3}, **sections).build()
    assert refused.value.table == table
    if table == "optimizer":
        assert "[nitp] start_step = 3 of 3 [training] steps: NITP is measured and never trained." in caplog.text


@pytest.mark.parametrize("error", [ValueError("ours"), AssertionError("ours")])
def test_an_error_that_is_not_torchtitan_s_stays_what_it_is(error):
    with pytest.raises(type(error), match="ours") as raised, upstream_refusals():
        raise error
    assert not isinstance(raised.value, UserError)
