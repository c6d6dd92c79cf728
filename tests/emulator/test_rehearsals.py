"""What a proof holds of a class: faults in what the class leaves open are found."""

from __future__ import annotations

import pytest

from .cases import DEPTHWISE, DIRECT, GEMM, HOPPER, Case
from .plants import Plant
from .plants.hidden import HIDDEN
from .test_modes import run_convolutions

# Compiled in seconds.
QUICK = ("direct: rows of an even number", "direct wgrad: empty slices", "depthwise generic: filters of a channel")


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(plant, id=plant.name.replace(" ", "-"), marks=() if plant.name in QUICK else pytest.mark.full)
        for plant in HIDDEN
    ],
)
def test_a_fault_is_caught_whichever_call_comes_first(plant: Plant) -> None:
    """The call, which is right, names the class: what is rehearsed depends on that alone."""
    case = plant.case
    assert isinstance(case, Case)
    hides = run_convolutions("plain", 0, "lazy", [case], plant.planted)
    assert hides.code == 0, f"{plant.name}: the call shows it\n{hides}"
    unmodified = run_convolutions("plain", 0, "lazy", [case], data="rehearsals")
    assert unmodified.code == 0, str(unmodified)
    caught = run_convolutions("plain", 0, "lazy", [case], plant.planted, data="rehearsals")
    assert caught.code != 0, f"{plant.name}: not caught"


@pytest.mark.parametrize(
    "cases", [DIRECT, DEPTHWISE, HOPPER, *GEMM.values()], ids=["direct", "depthwise", "hopper", *GEMM]
)
def test_a_right_kernel_gives_what_its_rehearsals_must(cases: list[Case]) -> None:
    result = run_convolutions("plain", 0, "lazy", cases, data="rehearsals")
    assert result.code == 0, str(result)
