"""Machine code of CUTLASS's wrappers of instructions and of freezekit's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .comparison import Comparison, hold, needs_nvidia
from .wrappers import COMPARISONS

pytestmark = needs_nvidia


@pytest.mark.parametrize("comparison", COMPARISONS, ids=str)
def test_wrappers_agree(comparison: Comparison, record_property: Callable[[str, object], None]) -> None:
    hold(comparison, record_property)
