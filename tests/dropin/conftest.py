"""The two ways to freezekit's savings, which the same tests hold against stock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import freezekit as fk


@pytest.fixture(params=["converted", "enabled"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    while fk.is_enabled():  # a test that failed amid its turn
        fk.disable()
