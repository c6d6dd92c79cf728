"""W', what dgrad's tensor-core kernel reads instead of a weight: kept for declared constants, and for no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from freezekit import constants
from freezekit.functional import conv2d_dgrad


def test_the_transposed_filter_of_an_undeclared_weight_is_never_stale() -> None:
    weight, dy = torch.randn(32, 16, 3, 3, dtype=torch.bfloat16), torch.randn(1, 32, 6, 6, dtype=torch.bfloat16)
    before = constants.usage()

    def dgrad() -> Tensor:
        return conv2d_dgrad(dy, weight, (1, 16, 8, 8), backend="emulated")

    fresh = dgrad()
    weight.data.mul_(2)
    assert torch.equal(dgrad(), 2 * fresh)
    weight.view(-1).view(torch.int16).numpy()[:] = 0
    assert not dgrad().any()
    assert constants.usage() == before


@pytest.mark.gpu
def test_a_captured_dgrad_makes_its_own_transposed_filter() -> None:
    """What the graph replays must read the weight as it is then, and live as long as the graph."""
    weight = torch.randn(32, 16, 3, 3, dtype=torch.bfloat16, device="cuda")
    dy = torch.randn(1, 32, 6, 6, dtype=torch.bfloat16, device="cuda")
    constants.declare_constant(weight)
    fresh = conv2d_dgrad(dy, weight, (1, 16, 8, 8), backend="native")
    before = constants.usage()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dx = conv2d_dgrad(dy, weight, (1, 16, 8, 8), backend="native")
    assert (constants.usage()["cached"], constants.usage()["hits"]) == (before["cached"], before["hits"])
    constants.invalidate(weight)
    weight.mul_(2)
    graph.replay()
    assert torch.equal(dx, 2 * fresh)


def test_the_transposed_filter_of_a_constant_is_made_once() -> None:
    """What dgrad's tensor-core kernel reads instead of the weight."""
    weight = torch.randn(32, 16, 3, 3, dtype=torch.bfloat16)
    dy = torch.randn(1, 32, 6, 6, dtype=torch.bfloat16)

    def dgrad() -> Tensor:
        return conv2d_dgrad(dy, weight, (1, 16, 8, 8), backend="emulated")

    fresh = dgrad()
    constants.declare_constant(weight)
    before = constants.usage()
    assert torch.equal(dgrad(), fresh)
    assert torch.equal(dgrad(), fresh)
    after = constants.usage()
    assert (after["misses"], after["hits"]) == (before["misses"] + 1, before["hits"] + 1)
    assert after["bytes"] == before["bytes"] + weight.nbytes
    weight.mul_(2)
    assert torch.equal(dgrad(), 2 * fresh)
    weight.data.mul_(2)
    with pytest.raises(RuntimeError, match="kept transposed filter of constant '' is stale"):
        constants.verify_constants(weight)
    constants.invalidate(weight)
    assert torch.equal(dgrad(), 4 * fresh)
    strided = weight.to(memory_format=torch.channels_last)
    constants.declare_constant(strided)
    assert torch.equal(conv2d_dgrad(dy, strided, (1, 16, 8, 8), backend="emulated"), 4 * fresh)
