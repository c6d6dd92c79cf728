"""Calls that need no gradient keep nothing, so the layers are torch's own functions then, on torch's own path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import freezekit as fk
from freezekit import functional
from tests.observe import Calls

ONES = torch.ones(4)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "hardtanh": lambda x: functional.hardtanh(x, -0.5, 0.5),
    "dropout": functional.dropout,
    "max_pool2d": lambda x: functional.max_pool2d(x, 2),
    "avg_pool2d": lambda x: functional.avg_pool2d(x, 3),
    "pad": lambda x: functional.pad(x, (1, 1, 1, 1), "reflect"),
    "batch_norm": lambda x: functional.batch_norm(x, ONES, ONES, eps=1e-3),
}


def libraries(call: Callable[[], object]) -> set[str]:
    """Whose operators run below autograd."""
    with Calls() as calls:
        call()
    return {name.split("::")[0] for name in calls.count}


@pytest.mark.parametrize("name", CALLS)
def test_torch_s_own_operator_runs(name: str) -> None:
    x = torch.linspace(-1, 1, 2 * 4 * 6 * 6).view(2, 4, 6, 6)
    learning = x.clone().requires_grad_()
    assert libraries(lambda: CALLS[name](x)) == {"aten"}
    with torch.no_grad():
        assert libraries(lambda: CALLS[name](learning)) == {"aten"}
    assert CALLS[name](learning).grad_fn.name().startswith("Freezekit")


def test_a_gradient_that_an_affine_parameter_needs_counts() -> None:
    bias = torch.ones(4, requires_grad=True)
    y = functional.batch_norm(torch.ones(2, 4, 3, 3), ONES, ONES, bias=bias)
    assert y.grad_fn.name() == "FreezekitBatchNormBackward"


def test_a_backend_that_was_demanded_runs() -> None:
    with fk.testing.emulated():
        assert libraries(lambda: functional.relu(torch.ones(2, 3))) >= {"freezekit"}
