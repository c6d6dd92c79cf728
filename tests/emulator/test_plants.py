"""The emulator proves itself: it finds every planted bug in the mode that must, and nothing in the code as it is."""

from __future__ import annotations

import re

import pytest

from .build import MODES, ROOT, UNMODIFIED, Patch, Planted, Result, overlay
from .cases import Case
from .plants import PLANTS, UNORDERED_SPLIT_K, Plant
from .test_modes import run_convolutions, run_small


def run_with(plant: Plant, planted: Planted) -> Result:
    if isinstance(plant.case, Case):
        return run_convolutions(plant.mode, plant.seed, plant.cp_async, [plant.case], planted)
    return run_small(plant.mode, plant.seed, [plant.case], planted)


def test_there_are_enough_plants_of_every_kind() -> None:
    assert len(PLANTS) >= 20
    assert {plant.mode for plant in PLANTS} == set(MODES) - {"ucontext"}
    assert len({plant.name for plant in PLANTS}) == len(PLANTS)


def test_every_patch_fits() -> None:
    """Most are compiled in `make emulate-all` alone, and would be missed until then."""
    for plant in (*PLANTS, *UNORDERED_SPLIT_K.values()):
        overlay(plant.planted.patches)
        assert all((ROOT / source).exists() for source in plant.planted.recompiled), plant.name


# Each is a compilation: `make test` takes the first of each patched file and of each mode, `make emulate-all` the rest.
_FIRST = {key: plant.name for plant in reversed(PLANTS) for key in (plant.planted.patches[0].path, plant.mode)}


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(
            plant,
            id=plant.name.replace(" ", "-"),
            marks=() if plant.name in _FIRST.values() else pytest.mark.full,
        )
        for plant in PLANTS
    ],
)
def test_the_bug_is_caught(plant: Plant) -> None:
    unmodified = run_with(plant, UNMODIFIED)
    assert unmodified.code == 0, str(unmodified)
    caught = run_with(plant, plant.planted)
    assert caught.code != 0, f"{plant.name}: not caught\n{caught}"
    assert re.search(plant.expect, caught.output), f"{plant.name}: expected {plant.expect!r}\n{caught}"


@pytest.mark.parametrize("family", UNORDERED_SPLIT_K)
def test_sums_in_the_order_of_the_schedule_are_caught(family: str) -> None:
    """Atomic adds instead of an ordered reduce: right for integers, and another result at every schedule for reals."""
    plant = UNORDERED_SPLIT_K[family]
    case, planted = plant.case, plant.planted
    assert isinstance(case, Case)
    unmodified = {run_convolutions("plain", seed, "lazy", [case], data="reals").output for seed in range(4)}
    assert len(unmodified) == 1
    assert run_convolutions("plain", 0, "lazy", [case], planted).code == 0
    sums = {run_convolutions("plain", seed, "lazy", [case], planted, data="reals").output for seed in range(4)}
    assert len(sums) > 1


def test_a_patch_that_no_longer_fits_is_an_error() -> None:
    with pytest.raises(AssertionError, match="has 0 places that read 'no such line'"):
        Patch("file", "no such line", "").apply("code")
    with pytest.raises(AssertionError, match="has 2 places"):
        Patch("file", "a", "b").apply("a a")
