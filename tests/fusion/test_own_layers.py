"""What a layer of a block has of its own, or somebody has put into its class, is what runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from freezekit.fusion.norms import register_norm


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)


def circular(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def own_conv_forward(net: nn.Sequential) -> None:
    net[0]._conv_forward = circular.__get__(net[0], nn.Conv2d)


def own_call(net: nn.Sequential) -> None:
    forward = net[1].forward
    net[1]._call_impl = lambda x: forward(x) + 1


def own_compiled_call(net: nn.Sequential) -> None:
    net[2]._compiled_call_impl = lambda x: x - 1


def own_statistics(net: nn.Sequential) -> None:
    net[1].__dict__["running_mean"] = torch.ones(4)


def own_weight(net: nn.Sequential) -> None:
    net[0].__dict__["weight"] = torch.ones(4, 3, 3, 3)


CHANGES = [own_conv_forward, own_call, own_compiled_call, own_statistics, own_weight]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_a_layer_has_of_its_own_runs(change: Callable[[nn.Sequential], None], after: bool) -> None:
    x, stock, ours = torch.randn(2, 3, 6, 6), block(), block()
    if after:
        fk.fuse(ours)
    untouched = stock(x)
    for net in (stock, ours):
        change(net)
    if not after:
        fk.fuse(ours)
    assert not torch.equal(stock(x), untouched)
    assert torch.equal(ours(x), stock(x))


PLACES = [(nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.BatchNorm2d, "forward"), (nn.ReLU, "forward")]


@pytest.mark.parametrize(("kind", "name"), PLACES, ids=lambda part: getattr(part, "__name__", part))
def test_what_was_put_into_a_class_runs(kind: type[nn.Module], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, stock, ours = torch.randn(2, 3, 6, 6), block(), fk.fuse(block())
    original = getattr(kind, name)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, lambda self, *arguments: original(self, *arguments) + 1)
        assert torch.equal(ours(x), stock(x))
    torch.testing.assert_close(ours(x), stock(x))


def test_another_call_of_modules_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, original = fk.fuse(block()), nn.Module.__call__
    seen: list[type[nn.Module]] = []

    def call(module: nn.Module, *arguments: object) -> object:
        seen.append(type(module))
        return original(module, *arguments)

    monkeypatch.setattr(nn.Module, "__call__", call)
    ours(torch.randn(2, 3, 6, 6))
    assert seen[1:] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


class PlainNorm(nn.Module):
    """As torchvision's FrozenBatchNorm2d: torch's promotion decides on the dtype of its result."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


register_norm(PlainNorm, always_fixed=True)


@pytest.mark.parametrize("casts", [False, True], ids=["bfloat16 convolution", "autocast"])
def test_a_norm_of_plain_operators_promotes(casts: bool) -> None:
    stock = nn.Sequential(nn.Conv2d(3, 4, 1), PlainNorm(4), nn.ReLU()).requires_grad_(False)
    x = torch.randn(2, 3, 5, 5)
    if not casts:
        stock[0].bfloat16()
        x = x.bfloat16()
    ours = fk.fuse(copy.deepcopy(stock))
    with torch.autocast("cpu", torch.bfloat16, enabled=casts):
        expected, got = stock(x), ours(x)
    assert expected.dtype == got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "change",
    [lambda norm: norm.double(), lambda norm: norm.half(), lambda norm: setattr(norm, "eps", -1e-3)],
    ids=["float64", "float16", "negative eps"],
)
def test_what_a_batch_norm_refuses_is_refused(change: Callable[[nn.Module], object]) -> None:
    x, stock, ours = torch.randn(2, 3, 6, 6), block(), fk.fuse(block())
    for net in (stock, ours):
        change(net[1])
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        stock(x)
    with pytest.raises(type(theirs.value)) as mine:
        ours(x)
    assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("size", [1, 2])
def test_strides_of_a_small_result(size: int) -> None:
    stock = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
    x = torch.randn(2, 8, size, size)
    assert fk.fuse(copy.deepcopy(stock))(x).stride() == stock(x).stride()
