"""Real processes against one rank, from one seed checkpoint: losses, gradients and weights of two steps."""

import pytest
from matrix import FAMILIES, Layout, LAYOUTS

COLUMNS = {"dense": "dense", "tied": "dense", "moe": "MoE"}
COMPARED = [layout for layout in LAYOUTS.values() if layout.entries]


def _in_table(layout: Layout):
    """The layout as a test parameter that knows its places in the table of tests/README.md."""
    rounded = f" (within {layout.gradient:g})" if layout.gradient > 1e-6 else ""
    column = COLUMNS.get(layout.model, layout.model)
    marks = [pytest.mark.technique(row, column, label + rounded) for row, label in layout.entries.items()]
    return pytest.param(layout.name, marks=marks)


@pytest.mark.parametrize("layout", [_in_table(layout) for layout in COMPARED if layout.model in COLUMNS])
def test_a_layout_equals_one_rank(differences, layout):
    assert differences(layout) == []


@pytest.mark.parametrize("layout", [_in_table(layout) for layout in COMPARED if layout.model in FAMILIES])
def test_every_family_equals_one_rank(differences, layout):
    assert differences(layout) == []


@pytest.mark.layouts("dense/one, no stop-gradient", "dense/one, cosine regularizer", "dense/one, same position")
@pytest.mark.layouts("dense/one")
def test_the_comparison_is_not_blind(results):
    """The results move from step to step, and from variant to variant."""
    first, second = results["dense/one"]["norms"]
    assert abs(first["projector"] - second["projector"]) > 1e-3 * first["projector"] > 0
    variants = ("one", "one, no stop-gradient", "one, cosine regularizer", "one, same position")
    assert len({round(results[f"dense/{name}"]["norms"][0]["rest"], 3) for name in variants}) == 4


@pytest.mark.layouts("moe/one, NTP alone", "moe/EP 2, NTP alone")
def test_without_nitp_a_run_has_neither_projector_nor_nitp_loss(results):
    for name in ("moe/one, NTP alone", "moe/EP 2, NTP alone"):
        assert [norms["projector"] for norms in results[name]["norms"]] == [0.0, 0.0]
        assert all("nitp_loss" not in record for record in results[name]["records"])


@pytest.mark.layouts("dense/one, single", "dense/FSDP 2, single", "dense/CP 2 head-tail, single", "dense/PP 2, single")
def test_without_a_valid_position_the_nitp_loss_is_zero_and_nothing_of_it_is_trained(results):
    for name in ("one", "FSDP 2", "CP 2 head-tail", "PP 2"):
        result = results[f"dense/{name}, single"]
        assert [record["nitp_loss"] for record in result["records"]] == [0.0, 0.0]
        assert [norms["projector"] for norms in result["norms"]] == [0.0, 0.0]
        assert all(norms["rest"] > 0 for norms in result["norms"])


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.layouts("dense/float8", "dense/float8 but the projector", "moe/float8", "moe/float8 but the projector")
def test_float8_converts_the_linears_that_are_not_filtered(results, model):
    """The projector is converted unless `filter_fqns` names it; lm_head is filtered by default."""
    every, but_projector = (results[f"{model}/{name}"]["linears"] for name in ("float8", "float8 but the projector"))
    projector = {f"nitp.projector.{name}" for name in ("w1", "w2", "w3")}
    assert _converted(every) == set(every) - {"lm_head"} >= projector
    assert _converted(but_projector) == set(every) - {"lm_head"} - projector


def _converted(linears: dict[str, str]) -> set[str]:
    return {name for name, kind in linears.items() if "Float8" in kind}
