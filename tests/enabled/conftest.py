"""Chains of any size: a bound by bytes would hide them from tests on small tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from freezekit import _C


@pytest.fixture(autouse=True)
def least_bytes() -> Iterator[int]:
    """From how many bytes on an operand is made again outside of these tests."""
    before = _C.chains.set_least_bytes(0)
    yield before
    _C.chains.set_least_bytes(before)
