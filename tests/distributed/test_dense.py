"""Every parallelism of the dense model equals one rank."""

import pytest
from matrix import LAYOUTS

@pytest.mark.parametrize("layout", [n for n, l in LAYOUTS.items() if n != l.reference])
def test_equal(differences, layout):
    assert differences(layout) == []
