"""The comparisons prove themselves: each planted misreading shows, where it must."""

from __future__ import annotations

import pytest

from tests.emulator.build import ROOT, overlay

from . import layouts, plans, wrappers
from .comparison import needs_nvidia
from .misreadings import MISREADINGS, Misreading

COMPARISONS = {c.name: c for module in (layouts, plans, wrappers) for c in module.COMPARISONS}


def test_each_kind_has_a_quick_one() -> None:
    assert len(MISREADINGS) == 21
    quick = [m.shows for m in MISREADINGS if m.quick]
    for module in (layouts, plans, wrappers):
        assert any(c.name in quick for c in module.COMPARISONS)
    assert {m.shows for m in MISREADINGS} <= set(COMPARISONS)


def test_every_patch_fits() -> None:
    for misreading in MISREADINGS:
        overlay(misreading.planted.patches)
        assert all((ROOT / source).exists() for source in misreading.planted.recompiled), misreading.name


@needs_nvidia
@pytest.mark.parametrize(
    "misreading",
    [pytest.param(m, id=m.name.replace(" ", "-"), marks=[] if m.quick else [pytest.mark.full]) for m in MISREADINGS],
)
def test_a_misreading_shows(misreading: Misreading) -> None:
    found = COMPARISONS[misreading.shows].compare(misreading.planted)
    assert found.differ > 0, f"{misreading.name}: {misreading.shows} does not notice"
