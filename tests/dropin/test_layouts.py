"""Strides of outputs and gradients are stock's, whatever lies in memory; the meta device tells the same strides."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import freezekit as fk
from freezekit.functional import conv2d, conv2d_dgrad, conv2d_wgrad
from tests.conftest import on

# (input, weight, settings): plain, 1x1, depthwise, and the sizes of 1 at which a layout is ambiguous.
PROBLEMS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 4, 6, 5), (6, 4, 3, 3), {}),
    ((2, 4, 6, 5), (6, 4, 1, 1), {}),
    ((2, 4, 6, 5), (4, 1, 3, 3), dict(groups=4)),
    ((2, 1, 6, 5), (3, 1, 3, 3), dict(stride=2)),
    ((2, 4, 6, 5), (1, 4, 3, 3), dict(dilation=2)),
    ((1, 4, 1, 1), (2, 4, 1, 1), {}),
    ((2, 1, 1, 5), (1, 1, 1, 3), {}),
    ((1, 3, 6, 5), (6, 3, 2, 3), dict(padding=1)),
]


def lay(tensor: Tensor, kind: str) -> Tensor:
    """The same values, lying differently."""
    n, c, h, w = tensor.shape
    if kind == "nchw":
        return tensor.clone(memory_format=torch.contiguous_format)
    if kind == "nhwc":
        return tensor.to(memory_format=torch.channels_last)
    if kind == "expanded":
        return tensor[:1, :, :1, :1].expand(n, c, h, w)
    if kind == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "batch inside":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    base = tensor.new_zeros(2 * tensor.numel() + 1)
    if kind == "misaligned":
        made = base[1 : 1 + tensor.numel()].view(n, c, h, w)
    elif kind == "every second":
        made = base[: 2 * tensor.numel()].view(n, c, h, 2 * w)[..., ::2]
    else:
        assert kind == "nhwc, every second"
        made = base[: 2 * tensor.numel()].view(n, h, w, 2 * c)[..., ::2].permute(0, 3, 1, 2)
    return made.copy_(tensor)


INPUTS = ["nchw", "nhwc", "expanded", "transposed", "batch inside", "misaligned", "every second", "nhwc, every second"]
WEIGHTS = ["nchw", "nhwc", "transposed", "misaligned"]
GRADS = ["nchw", "nhwc", "expanded"]


def run(
    conv: Any, made: tuple[Tensor, Tensor], kinds: tuple[str, ...], frozen: bool, **kwargs: Any
) -> dict[str, Tensor]:
    x, w = (lay(t, kind).detach() for t, kind in zip(made, kinds))
    x.requires_grad_()
    w.requires_grad_(not frozen)
    y = conv(x, w, **kwargs)
    g = torch.arange(y.numel(), device=y.device, dtype=y.dtype).view(y.shape) % 3 - 1
    grads = torch.autograd.grad(y, [x] if frozen else [x, w], lay(g, kinds[2]))
    return dict(zip(("y", "dx", "dw"), (y, *grads)))


def strides(tensor: Tensor, exact: bool) -> tuple[int, ...]:
    """Of a gradient, only the dimensions that have more than one element: the stride of the others tells nothing."""
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape) if exact or size > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_strides_and_values_are_stock_s(problem: tuple[Any, Any, dict[str, Any]], dtype: torch.dtype) -> None:
    x_size, w_size, settings = problem
    made = torch.randint(-2, 3, x_size).to(dtype), torch.randint(-2, 3, w_size).to(dtype)
    meta = made[0].to("meta"), made[1].to("meta")
    wrong = []
    for *kinds, frozen in product(INPUTS, WEIGHTS, GRADS, (False, True)):
        case = tuple(kinds)
        stock = run(F.conv2d, made, case, frozen, **settings)
        ours = {
            "aten": run(conv2d, made, case, frozen, backend="aten", **settings),
            "meta": run(conv2d, meta, case, frozen, **settings),
        }
        if dtype == torch.float32 and kinds[2] != "expanded":
            with on("emulated"):
                ours["emulated"] = run(conv2d, made, case, frozen, **settings)
        for where, results in ours.items():
            for name, tensor in results.items():
                if strides(tensor, exact=name == "y") != strides(stock[name], exact=name == "y"):
                    wrong.append((where, name, case, frozen, stock[name].stride(), tensor.stride()))
                if where == "meta":
                    assert tensor.stride() == ours["aten"][name].stride(), (name, case, frozen)
                else:
                    assert torch.equal(tensor, stock[name]), (where, name, case, frozen)
    assert not wrong, f"{len(wrong)} differ, among them {wrong[:: max(1, len(wrong) // 10)]}"


@pytest.mark.parametrize("backend", ["aten", "emulated"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_gradients_alone(layout: str, backend: str) -> None:
    """conv2d_dgrad and conv2d_wgrad called by hand: channels_last if either operand is, and meta agrees."""
    for dtype in (torch.float32, torch.float64):
        x, w = torch.randn(2, 4, 6, 5, dtype=dtype), torch.randn(6, 4, 3, 3, dtype=dtype)
        g = lay(torch.randn(2, 6, 4, 3, dtype=dtype), layout)
        with on(backend):
            real_ones = conv2d_dgrad(g, w, x.shape), conv2d_wgrad(g, x, w.shape)
        meta_ones = (
            conv2d_dgrad(g.to("meta"), w.to("meta"), x.shape),
            conv2d_wgrad(g.to("meta"), x.to("meta"), w.shape),
        )
        for real, meta in zip(real_ones, meta_ones):
            assert real.stride() == meta.stride()
            order = torch.channels_last if layout == "nhwc" else torch.contiguous_format
            assert real.is_contiguous(memory_format=order)


def test_sizes_past_2_to_the_31_elements() -> None:
    """Shapes alone, on the meta device: nothing is allocated."""
    x = torch.empty(70_000, 16, 64, 64, device="meta", requires_grad=True)
    w = torch.empty(32, 16, 3, 3, device="meta", requires_grad=True)
    assert x.numel() > 2**32
    y = conv2d(x, w, stride=2, padding=1)
    assert y.shape == F.conv2d(x, w, stride=2, padding=1).shape == (70_000, 32, 32, 32)
    dx, dw = torch.autograd.grad(y, (x, w), torch.empty_like(y))
    assert (dx.shape, dw.shape) == (x.shape, w.shape)
    assert conv2d_dgrad(y, w, x.shape, 2, 1).stride() == x.stride()


def test_one_dimension_past_2_to_the_31() -> None:
    x, w = torch.empty(1, 1, 3, 2**31 + 8, device="meta"), torch.empty(1, 1, 3, 3, device="meta")
    assert conv2d(x, w).shape == F.conv2d(x, w).shape == (1, 1, 1, 2**31 + 6)


BITS = ("relu", "relu6", "leaky_relu", "hardtanh", "dropout")


@pytest.mark.parametrize("name", [*BITS, "max_pool2d"])
def test_what_layers_keep_past_2_to_the_31_elements(name: str) -> None:
    """Words of 32 bits, or a byte per output element, counted in 64 bits: on the meta device, where nothing is."""
    x = torch.empty(70_000, 16, 64, 64, device="meta", requires_grad=True)
    settings = (2,) if name == "max_pool2d" else ()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = getattr(fk.functional, name)(x, *settings)
    stock = getattr(F, name)(x, *settings)
    assert (y.shape, y.stride()) == (stock.shape, stock.stride())
    assert sum(t.numel() * t.element_size() for t in kept) == (x.numel() // 8 if name in BITS else y.numel())
    (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert (dx.shape, dx.stride()) == (x.shape, x.stride())


def test_one_dimension_past_2_to_the_31_in_layers() -> None:
    x = torch.empty(2**31 + 40, device="meta", requires_grad=True)
    y = fk.functional.relu(x)
    assert torch.autograd.grad(y, x, torch.empty_like(y))[0].shape == x.shape
    x = torch.empty(1, 1, 2, 2**31 + 8, device="meta", requires_grad=True)
    y = fk.functional.max_pool2d(x, 2)
    assert y.shape == F.max_pool2d(x, 2).shape == (1, 1, 1, 2**30 + 4)
    assert torch.autograd.grad(y, x, torch.empty_like(y))[0].shape == x.shape
