"""Gradients of gradients through fused blocks: which are None, which zeros, which require grad, as without `fuse`.

Penalties of gradients, lazy R1 and MAML differentiate a frozen network's input gradient. A block's own gradient is
linear, so what flows back to the input is zeros or nothing; torch's optimizers, DDP and autograd.grad tell them apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from freezekit.fusion import fuse, fusion_report
from tests.fusion.nets import BasicBlock, Bottleneck, settled


class Summed(nn.Module):
    """A block whose sum is activated by a layer of your choice."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.activation = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)) + x)


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(super().forward, x, use_reentrant=False)


def chain(*behind: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), *behind)


NETS: dict[str, Callable[[], nn.Module]] = {
    "convolution": chain,
    "norm": lambda: chain(nn.BatchNorm2d(4)),
    "relu": lambda: chain(nn.ReLU()),
    "relu in place": lambda: chain(nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "relu6": lambda: chain(nn.BatchNorm2d(4), nn.ReLU6()),
    "two blocks": lambda: nn.Sequential(chain(nn.BatchNorm2d(4), nn.ReLU()), chain(nn.BatchNorm2d(4), nn.ReLU6())),
    "two without an activation": lambda: nn.Sequential(chain(nn.BatchNorm2d(4)), chain(nn.BatchNorm2d(4))),
    "sum": lambda: Summed(nn.ReLU()),
    "sum, relu6": lambda: Summed(nn.ReLU6()),
    "shared input": lambda: nn.Sequential(Bottleneck(4, 8, 2), Bottleneck(8, 8), BasicBlock(8)),
    "checkpoint": lambda: Checkpointed(Summed(nn.ReLU6()), Summed(nn.ReLU())),
}
STEM = lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())  # noqa: E731
HEAD = lambda: nn.Sequential(nn.LazyConv2d(2, 1), nn.Sigmoid())  # noqa: E731


def orders(model: nn.Module) -> list[tuple[bool, Tensor | None]]:
    """Gradients up to the third order, of the input and the parameters that train, each of a sum of squares before."""
    x = torch.linspace(-2, 3, 2 * 4 * 36, dtype=torch.float64).view(2, 4, 6, 6).requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    loss, found = model(x).square().sum(), []
    for _ in range(3):
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        found += [(gradient is not None and gradient.requires_grad, gradient) for gradient in gradients]
        followed = [gradient for gradient in gradients if gradient is not None and gradient.requires_grad]
        if not followed:
            break
        loss = torch.stack([gradient.square().sum() for gradient in followed]).sum()
    return found


@pytest.mark.parametrize("learns", ["nothing", "the stem", "the head"])
@pytest.mark.parametrize("name", NETS)
def test_pattern_and_values_are_those_of_the_layers(name: str, learns: str) -> None:
    torch.manual_seed(0)
    frozen = settled(NETS[name]())
    model = nn.Sequential(
        *([STEM()] if learns == "the stem" else []), frozen, *([HEAD()] if learns == "the head" else [])
    )
    model(torch.zeros(1, 4, 6, 6))
    model.double()
    fused = fuse(copy.deepcopy(model))
    assert any(row.fused for row in fusion_report(fused))
    ours, theirs = orders(fused), orders(model)
    assert len(ours) == len(theirs)
    for (recorded, mine), (expected, other) in zip(ours, theirs, strict=True):
        assert (mine is None, recorded) == (other is None, expected)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_a_penalty_of_a_frozen_network_s_gradient() -> None:
    """The loss of one: it must have a backward pass, even where nothing comes of it."""
    model = fuse(settled(nn.Sequential(BasicBlock(4), BasicBlock(4))))
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
