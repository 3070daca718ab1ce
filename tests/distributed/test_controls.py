"""The comparison fails for mistakes made on purpose, and for what is refused because TorchTitan has it wrong."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from helpers import make_config
from layouts import in_child
from matrix import LAYOUTS

from nitp_titan.config.parallelism import check_parallelism
from nitp_titan.errors import UserError


def _controlled(*controls: str) -> list[str]:
    return [layout.name for layout in LAYOUTS.values() if layout.control in controls]


@pytest.mark.parametrize("layout", _controlled("no halo", "shard-local shift"))
def test_a_wrong_exchange_across_context_parallel_ranks_is_found(differences, layout):
    found = " ".join(differences(layout))
    assert "nitp_loss" in found and "gradient of projector" in found and "gradient of rest" in found


@pytest.mark.parametrize("layout", _controlled("no divide factor"))
def test_a_projector_gradient_that_is_averaged_and_not_summed_is_found(differences, results, layout):
    assert any("gradient of projector" in found for found in differences(layout))
    one, halved = (results[name]["norms"][0] for name in (LAYOUTS[layout].reference, layout))
    assert halved["projector"] == pytest.approx(one["projector"] / 2, rel=1e-6)
    assert halved["rest"] == pytest.approx(one["rest"], rel=1e-6)


@pytest.mark.parametrize("layout", _controlled("resharded"))
def test_with_the_final_norm_resharded_a_zero_bubble_schedule_loses_its_gradient(differences, results, layout):
    """TorchTitan's own chunked loss; when this fails, `ChunkedLoss.Config.reshard_lm_head` can go."""
    found = differences(layout)
    assert any("gradient of rest" in difference for difference in found)
    assert not any("step 1 gradient of projector" in difference for difference in found)


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "DualPipeV", "InterleavedZeroBubble"])
def test_validation_is_refused_with_schedules_that_always_run_a_backward_pass(tmp_path, schedule):
    sections = LAYOUTS["dense/PP 2 ZBVZeroBubble"].sections
    parallelism = {**sections["parallelism"], "pipeline_parallel_schedule": schedule}
    config = make_config(tmp_path, **{**sections, "parallelism": parallelism, "validator": {"enable": True}})
    if schedule == "InterleavedZeroBubble":
        return check_parallelism(config, 2)
    with pytest.raises(UserError, match=rf"\[validator\] enable = true, but torch 2.14 runs schedule {schedule}"):
        check_parallelism(config, 2)


@pytest.mark.parametrize("layout", _controlled("no check"))
def test_what_is_refused_as_wrong_upstream_still_is(differences, layout, tmp_path):
    """When this fails, TorchTitan has mended it: take the refusal out of `config.parallelism`."""
    assert any("gradient of rest" in found for found in differences(layout))
    with pytest.raises(UserError, match=r"TorchTitan 0.3.0 gets .* wrong"):
        check_parallelism(make_config(tmp_path, **LAYOUTS[layout].sections), LAYOUTS[layout].ranks)


def test_a_process_ended_from_outside_leaves_the_signal(tmp_path):
    in_child(tmp_path / "lost.json", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("lost.0.signal", "SIGKILL")]


@pytest.mark.parametrize("times", [1, 2])
def test_a_layout_that_lost_a_process_is_trained_once_more_and_no_more(results, tmp_path, monkeypatch, times):
    """Rank 1 ends in the first launches; rank 0 then reports that its peer is gone."""
    name, launches = "dense/FSDP 2", []

    def launch(ranks, worker, folder, ports):
        names = json.loads(Path(ports).read_text())
        launches.append(list(names))
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        if name in names and len([one for one in launches if name in one]) <= times:
            path.with_suffix(".1.signal").write_text("SIGSEGV")
            path.with_suffix(".0.error").write_text("Connection closed by peer")
        elif name in names:
            path.write_text('{"norms": []}')
        return subprocess.CompletedProcess([], 0, "", "Fatal Python error")

    # Not by the module's name: several folders have a conftest.
    monkeypatch.setitem(type(results)._launch.__globals__, "warm_ranks", launch)
    ours = type(results)(tmp_path, {name: LAYOUTS[name]})
    with pytest.warns(UserWarning, match="SIGSEGV(.|\n)*Fatal Python error"):
        if times == 1:
            assert ours[name]["norms"] == []
        else:
            with pytest.raises(AssertionError, match="SIGSEGV"):
                ours[name]
    assert launches == [["seeds/dense"], [name], [name]]
