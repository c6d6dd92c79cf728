"""Every client's networks: values, gradients and bytes kept, converted, enabled and fused, against stock."""

from __future__ import annotations

import pytest
import torch

from bench.packages import missing
from bench.timing import small_heap
from tests.clients.cases import CASES, Case
from tests.clients.harness import WAYS, compare, runs

pytestmark = pytest.mark.full
each = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _installed(case: Case) -> None:
    if why := missing(case.client):
        pytest.skip(why)


@each
def test_in_float32(case: Case) -> None:
    side = runs(case, torch.float32)
    for way, found in compare(side).items():
        if way == "fused":
            # A block's norm is a scale and a shift after the convolution, rounded otherwise. Values near a kink can
            # then be on its other side, which gradients show in full: test_in_float64 holds those.
            assert found.value_error <= 1e-4, way
        else:
            # Layers compute torch's values, so that every kink goes the same way. The sums in gradients may be in
            # another order, through as many as 120 layers.
            assert found.equal, way
            assert found.gradient_error <= 1e-4, way
    with small_heap():
        kept = {way: run.kept() for way, run in side.items()}
    assert all(kept[way] <= kept["stock"] for way in WAYS), kept


@each
def test_in_float64(case: Case) -> None:
    for way, found in compare(runs(case, torch.float64)).items():
        assert found.value_error <= 1e-10, way
        assert found.gradient_error <= 1e-10, way
