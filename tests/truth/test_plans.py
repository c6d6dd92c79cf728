"""Maps and copies of CUTLASS's convolutions and of the Hopper kernels'."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .comparison import Comparison, hold, needs_nvidia
from .plans import COMPARISONS

pytestmark = needs_nvidia


@pytest.mark.parametrize("comparison", COMPARISONS, ids=str)
def test_plans_agree(comparison: Comparison, record_property: Callable[[str, object], None]) -> None:
    hold(comparison, record_property)
