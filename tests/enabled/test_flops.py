"""torch's FLOP counter gives freezekit's operators the figures of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import freezekit as fk


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.Flatten(2),
        nn.Conv1d(4, 4, 3),
    )


def flops(model: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Of the forward pass, and of the backward pass of a forward that no mode has watched."""
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        model(x)
    y = model(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("way", ["enabled", "converted", "fused"])
def test_they_are_torch_s(way: str, frozen: bool) -> None:
    model = net().eval().requires_grad_(not frozen)
    stock = flops(model)
    assert min(stock) > 0
    if way != "enabled":
        model = fk.convert(model)
    if way == "fused":
        model = fk.fuse(model)
    with fk.enabled() if way == "enabled" else nullcontext():
        assert flops(model) == stock


def second_order(layer: nn.Module) -> int:
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    y = layer(x)
    with FlopCounterMode(display=False) as counter:
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_in_second_order_groups_are_counted_as_in_the_first(kind: type[nn.Conv2d]) -> None:
    for groups in (1, 2):
        layer = kind(4, 8, 3, groups=groups)
        stock = second_order(layer)
        windows = 49 if kind is nn.Conv2d else 81
        ungrouped = 2 * 2 * windows * 4 * 8 * 9  # what torch counts for a weight gradient, whatever the groups
        converted = second_order(fk.convert(nn.Sequential(layer)))
        assert converted - stock == ungrouped - ungrouped // groups
