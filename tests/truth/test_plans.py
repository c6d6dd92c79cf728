"""Maps and copies of CUTLASS's convolutions and of the Hopper kernels'."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.emulator.build import UNMODIFIED

from .comparison import Comparison, hold, needs_nvidia
from .emulated import library
from .plans import COLUMNS, COMPARISONS, FARTHEST, QUICK, of_cutlass, of_kernel
from .records import OPERATORS, Problem


def test_every_tile_of_the_hopper_kernels_is_compared() -> None:
    tiles = [library(UNMODIFIED).truth_columns(config) for config in range(len(COLUMNS) + 1)]
    assert tiles == [*COLUMNS, 0]


@needs_nvidia
@pytest.mark.parametrize("op", OPERATORS)
def test_a_tap_that_reads_further_is_refused_by_both(op: str) -> None:
    problem = Problem(op, 1, 1, 200, 64, 64, 1, 2, pad=(0, 127), dilation=(1, FARTHEST + 1))
    with pytest.raises(AssertionError, match="CUTLASS refuses"):
        of_cutlass(problem, QUICK)
    with pytest.raises(AssertionError, match="the Hopper kernels do not take"):
        of_kernel(problem, QUICK, UNMODIFIED)


@needs_nvidia
@pytest.mark.parametrize(
    "comparison",
    [pytest.param(c, id=c.name, marks=[] if c.quick else [pytest.mark.full]) for c in COMPARISONS],
)
def test_plans_agree(comparison: Comparison, record_property: Callable[[str, object], None]) -> None:
    hold(comparison, record_property)
