"""`explain` of every client's networks: each byte is counted, and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import freezekit as fk
from bench.packages import missing
from freezekit.enabling import watched
from tests.clients.cases import CASES, Case
from tests.explanation.test_nothing_changes import picture, same
from tests.observe import bytes_saved

pytestmark = pytest.mark.full


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_byte_is_counted_and_nothing_changes(case: Case) -> None:
    if why := missing(case.client):
        pytest.skip(why)
    model, call = fk.convert(case.build()), case.call
    x = torch.rand(case.shape).requires_grad_(case.input_learns)

    def run(x: torch.Tensor) -> Any:
        torch.manual_seed(2)  # what detectors sample decides what they keep
        return call(model, x)

    with watched():  # else hooks on what is saved are given what chains make again
        expected = bytes_saved(lambda: run(x), [*model.parameters(), *model.buffers()])
    before = picture(model)
    assert fk.explain(run, x).bytes_kept == expected
    assert all(same(a, b) for a, b in zip(before, picture(model), strict=True))
