"""The examples in the bench's docstrings say what happens."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("timing", "report", "environment", "layer_lists", "sides")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"bench.{name}"))
    assert result.attempted
    assert not result.failed
