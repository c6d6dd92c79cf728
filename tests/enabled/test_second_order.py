"""Stock's pattern of None and zeros in every order: of every layer, converted and enabled, and of every chain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from freezekit.conversion import SWAPS
from tests.nn.test_conversion import ARGUMENTS
from tests.operators.test_second_order import compare

WAYS = ["converted", "enabled"]


def layer(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    """A layer of torch's, and an input of it."""
    name = kind.__name__
    settings = {"track_running_stats": True} if name.startswith("InstanceNorm") else {}
    axes = next((int(digit) for digit in name[-2:] if digit.isdigit()), 2)
    x = torch.randn(2, 2 if "Conv" in name else 4, *[4] * axes)
    return kind(*({"Threshold": (0.1, 0.2)} | ARGUMENTS).get(name, ()), **settings), x


class Gated(nn.Module):
    """Of two halves of a tensor, one behind an activation, as GEGLU."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, 1)
        return F.gelu(gate) * value


class Modulated(nn.Module):
    """A norm, an activation and a product with something else, as in efficient nets."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = norm, nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(x))
        return y * y.mean((2, 3), keepdim=True).sigmoid()


CHAINS: dict[str, Callable[[], nn.Module]] = {
    **{f"GroupNorm, {kind.__name__}": (lambda kind=kind: nn.Sequential(nn.GroupNorm(2, 4), kind()))
       for kind in (nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ReLU)},
    "LayerNorm, GELU": lambda: nn.Sequential(nn.LayerNorm(4), nn.GELU()),
    "BatchNorm2d, SiLU": lambda: nn.Sequential(nn.BatchNorm2d(4).eval(), nn.SiLU()),
    "SiLU in place": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(inplace=True)),
    "GroupNorm, Modulated": lambda: Modulated(nn.GroupNorm(2, 4)),
    "BatchNorm2d, Modulated": lambda: Modulated(nn.BatchNorm2d(4).eval()),
    "Gated": Gated,
}  # fmt: skip


def check(stock: nn.Module, x: Tensor, way: str) -> None:
    stock = stock.double()
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    for learns in product((True, False), repeat=1 + len(list(stock.parameters()))):
        if not any(learns):
            continue
        results, leaves = [], []
        for ours in (False, True):
            model = copy.deepcopy(stock)
            own = [x.double().clone(), *model.parameters()]
            for tensor, learn in zip(own, learns, strict=True):
                tensor.requires_grad_(learn)
            if ours and way == "converted":
                fk.convert(model)
            torch.manual_seed(3)
            with fk.enabled() if ours and way == "enabled" else nullcontext():
                results.append(model(own[0] * 1))
            leaves.append([tensor for tensor in own if tensor.requires_grad])
        orders = 3 if len(leaves[0]) == 1 else 2
        compare(results[1], results[0], leaves[1], leaves[0], orders, f"{way}, {learns}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [*SWAPS, nn.Threshold, nn.RReLU], ids=lambda kind: kind.__name__)
def test_layers(kind: type[nn.Module], way: str, training: bool) -> None:
    stock, x = layer(kind)
    check(stock.train(training), x, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, way: str) -> None:
    check(CHAINS[name](), torch.randn(2, 4, 4, 4), way)
