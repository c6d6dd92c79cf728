"""Launches and bytes of the layers with kernels, under `auto` on a GPU, counted on a CPU: before a proof, and after.

Before, a layer is torch's own operator, which is what stock runs. After, it is never above stock's bytes by more than
its mask, which is written once and read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import freezekit as fk
from freezekit import _C
from tests.proof.stand_in import stand_in
from tests.proof.test_layers import LAYERS, step

aten = torch.ops.aten
POOL = [3, 3], [2, 2], [1, 1]

# What stock launches on a GPU: forward of x, backward of dy, x and what forward gave.
STOCK: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "relu": (aten.relu, lambda dy, x, y: aten.threshold_backward(dy, y, 0)),
    "relu6": (lambda x: aten.hardtanh(x, 0, 6), lambda dy, x, y: aten.hardtanh_backward(dy, x, 0, 6)),
    "leaky_relu": (lambda x: aten.leaky_relu(x, 0.2), lambda dy, x, y: aten.leaky_relu_backward(dy, x, 0.2, False)),
    "dropout": (
        lambda x: aten.native_dropout(x, 0.5, True),
        lambda dy, x, y: aten.native_dropout_backward(dy, y[1], 2.0),
    ),
    "max_pool2d": (
        lambda x: aten.max_pool2d_with_indices(x, *POOL),
        lambda dy, x, y: aten.max_pool2d_with_indices_backward(dy, x, *POOL, [1, 1], False, y[1]),
    ),
}


class Traffic(TorchDispatchMode):
    """What operators are called, and the bytes of the tensors that each reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        self.calls.append((func.name(), sum(t.nbytes for t in tensors)))
        return result


def x_of(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 4, 64, 64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_before_it_is_proven_a_layer_runs_what_stock_runs(name: str, dtype: torch.dtype) -> None:
    _, own, stock, _ = LAYERS[name]
    x = x_of(dtype)
    traffic = []
    for layer in (stock, own):
        with stand_in(), Traffic() as seen:
            step(layer, x)
        traffic.append(seen.calls)
    assert traffic[0] == traffic[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STOCK)
def test_once_proven_it_moves_no_more_than_stock_and_its_mask(name: str, dtype: torch.dtype) -> None:
    x = x_of(dtype).detach()
    forward, backward = STOCK[name]
    with Traffic() as stock:
        made = forward(x)
        y = made[0] if isinstance(made, tuple) else made
        dy = torch.ones_like(y)
        backward(dy, x, made)
    calls = [call for call in stock.calls if "ones_like" not in call[0]]
    assert len(calls) == 2

    proving = log_of(LAYERS[name][1], x, steps=1)
    if name == "dropout":
        # The mask of bytes is torch's own on a GPU; only the proof meets the kernel that packs it on a CPU.
        own = [calls[0], *(row for row in proving if row[0] in ("pack_bytes", "gate_scale"))][:3]
        assert [kernel for kernel, _ in own[1:]] == ["pack_bytes", "gate_scale"]
    else:
        own = log_of(LAYERS[name][1], x, steps=2)[-2:]
        assert [kernel for kernel, _ in own] == LAYERS[name][3]
    mask = (y.numel() if name == "max_pool2d" else y.numel() // 8) * 2  # taps or bits, written and read
    assert sum(moved for _, moved in own) <= sum(moved for _, moved in calls) + mask
    if name != "dropout":
        assert sum(moved for _, moved in own) < sum(moved for _, moved in calls)


def log_of(layer: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> list[tuple[str, int]]:
    """Kernel and bytes of each launch of some steps, the proof's among them."""
    _C.set_launch_log(True)
    try:
        with stand_in():
            for _ in range(steps):
                step(layer, x)
        return [(row["kernel"], row["bytes"]) for row in _C.take_launch_log()]
    finally:
        _C.set_launch_log(False)


def test_what_is_counted() -> None:
    """One element of each tensor, by hand: relu in float32."""
    x = torch.randn(32 * 100)
    with fk.testing.emulated():
        rows = log_of(fk.functional.relu, x, steps=1)
    assert rows == [("activation_relu", 3200 * 8 + 400), ("gate_select", 3200 * 8 + 400)]
    with Traffic() as seen:
        F.threshold(x, 0, 0)
    assert [moved for _, moved in seen.calls] == [3200 * 8]
