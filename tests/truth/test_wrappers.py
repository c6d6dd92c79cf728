"""Machine code of CUTLASS's wrappers of instructions and of freezekit's."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from . import nvidia
from .comparison import Comparison, hold, needs_nvidia
from .wrappers import COMPARISONS

# CUTLASS has no function for a float's rounding to tf32; the others are parts of wrappers that are compared.
NOT_COMPARED = {"to_tf32", "shared_address", "ldmatrix_any"}


def test_every_wrapper_is_compared() -> None:
    headers = (nvidia.CSRC / "kernels" / name for name in ("ptx.h", "hopper/ptx_sm90.h"))
    wrappers = {name for header in headers for name in re.findall(r"^FK_DEVICE \w+ (\w+)", header.read_text(), re.M)}
    compared = set(re.findall(r"ptx::(\w+)", (nvidia.HERE / nvidia.WRAPPERS[0]).read_text()))
    assert wrappers - compared == NOT_COMPARED


@needs_nvidia
@pytest.mark.parametrize("comparison", COMPARISONS, ids=str)
def test_wrappers_agree(comparison: Comparison, record_property: Callable[[str, object], None]) -> None:
    hold(comparison, record_property)
