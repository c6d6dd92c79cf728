"""A comparison: the same question to NVIDIA's sources and to freezekit, and how many answers differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.conftest import NVIDIA_LINE
from tests.emulator.build import UNMODIFIED, Planted

from . import nvidia

needs_nvidia = pytest.mark.skipif(bool(nvidia.missing()), reason=nvidia.missing())


@dataclass(frozen=True)
class Found:
    """How many of the values that were compared differ, and what else is worth saying."""

    differ: int
    of: int
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """`compare` holds freezekit as it is, or with a misreading planted, against NVIDIA's sources.

    `quick`: part of `make test`.
    """

    name: str
    compare: Callable[[Planted], Found]
    quick: bool = True

    def __str__(self) -> str:
        return self.name


def hold(comparison: Comparison, record_property: Callable[[str, object], None]) -> None:
    """The test of a comparison; its line is shown in the summary at the end of the run."""
    found = comparison.compare(UNMODIFIED)
    note = f" ({found.note})" if found.note else ""
    line = f"{comparison.name}: {found.differ} of {found.of} differ{note}"
    record_property(NVIDIA_LINE, line)
    assert found.of > 0, f"{comparison.name} compares nothing"
    assert found.differ == 0, line
