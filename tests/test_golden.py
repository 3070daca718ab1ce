"""Golden losses: small runs on generated data give the losses that are kept in tests/golden."""

import json
import subprocess
import sys

import pytest
from golden.write import CASES, measure, read, STEPS
from processes import PROJECT

# Relative, of NTP loss, NITP loss and gradient norm. The instruction sets SSE, AVX2 and AVX-512 differ by at most
# 1.2e-6, 4.9e-4 and 7.7e-4, the largest in the MoE's last steps; two threads there by 1.8 tolerances.
TOLERANCES = (1e-5, 2e-3, 3e-3)


def _worst(rows, golden) -> float:
    """Largest relative difference of two tables, in units of the tolerance."""
    assert rows.keys() == golden.keys() and {len(row) for row in rows.values()} == {len(golden[1])}
    tolerances = TOLERANCES if len(golden[1]) == 3 else TOLERANCES[::2]
    return max(
        abs(a - b) / abs(b) / tolerance
        for step in golden
        for a, b, tolerance in zip(rows[step], golden[step], tolerances)
    )


@pytest.fixture(scope="module")
def measured(assets) -> dict[str, dict[int, list[float]]]:
    """All cases, in a process of their own: torch takes its instruction set when it is loaded."""
    command = [sys.executable, "tests/golden/write.py", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout.splitlines()[-1])
    return {name: {int(step): values for step, values in rows.items()} for name, rows in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_that_are_kept(measured, name):
    """After a change that is meant to change them: python tests/golden/write.py"""
    golden = read(name)
    assert len(golden) == STEPS and len(golden[1]) == (2 if name.startswith("ntp") else 3)
    assert _worst(measured[name], golden) < 1


def test_a_weight_that_is_5_percent_off_is_seen(assets, tmp_path):
    assert _worst(measure("nitp_debug", tmp_path, weight=1.05), read("nitp_debug")) > 5
