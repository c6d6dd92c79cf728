"""Networks of other libraries' kinds: what they keep, frozen, beside stock and beside convert."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from tests.enabled.helpers import gradients
from tests.observe import bytes_saved


class OwnConv2d(nn.Conv2d):
    """As detectron2's: norm and activation belong to the convolution's class."""

    def __init__(self, *args: Any, norm: nn.Module | None = None, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, bias=norm is None, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class FrozenBatchNorm2d(nn.Module):
    """As detectron2's and torchvision's: buffers, and a function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 1.5)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)


class Bottleneck(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], width: int) -> None:
        super().__init__()
        self.conv1 = OwnConv2d(width, width // 4, 1, norm=norm(width // 4), activation=F.relu_)
        self.conv2 = OwnConv2d(width // 4, width // 4, 3, padding=1, norm=norm(width // 4), activation=F.relu_)
        self.conv3 = OwnConv2d(width // 4, width, 1, norm=norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv3(self.conv2(self.conv1(x))) + x)


class Detector(nn.Module):
    """A ResNet of classes that convert leaves alone."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = OwnConv2d(3, 32, 7, stride=2, padding=3, norm=norm(32), activation=F.relu_)
        self.blocks = nn.Sequential(*[Bottleneck(norm, 32) for _ in range(4)])
        self.lateral = OwnConv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lateral(self.blocks(F.max_pool2d(self.stem(x), 3, 2, 1)))


def build(norm: Callable[[int], nn.Module]) -> Detector:
    torch.manual_seed(0)
    return Detector(norm).eval().requires_grad_(False)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_a_detector_keeps_bits(norm: Callable[[int], nn.Module]) -> None:
    model = build(norm)
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    owned = [*model.parameters(), *model.buffers(), x]
    stock, expected = bytes_saved(lambda: model(x * 1), owned), gradients(model, x)
    other = fk.convert(copy.deepcopy(model))
    converted = bytes_saved(lambda: other(x * 1), [*other.parameters(), *other.buffers()])
    with fk.enabled():
        ours, found = bytes_saved(lambda: model(x * 1), owned), gradients(model, x)
    assert ours <= 0.04 * stock
    assert ours <= converted
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_two_norms_keep_the_same() -> None:
    x = torch.randn(2, 3, 64, 64, requires_grad=True)

    def with_norm(norm: Callable[[int], nn.Module]) -> int:
        model = build(norm)
        with fk.enabled():
            return bytes_saved(lambda: model(x * 1), [*model.parameters(), *model.buffers()])

    scales = 4 * 9 * 32 * 4  # FrozenBatchNorm2d makes its scale at each call
    assert abs(with_norm(nn.BatchNorm2d) - with_norm(FrozenBatchNorm2d)) <= scales


def test_weight_standardisation_keeps_weights_alone() -> None:
    """The convolution reads a weight that is made at each call: dgrad reads that, and nothing else is kept."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            flat = self.weight.flatten(1)
            weight = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(self.weight)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    model = nn.Sequential(*[Standardised(8, 8, 3, padding=1) for _ in range(3)]).requires_grad_(False)
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    with fk.enabled():
        assert bytes_saved(lambda: model(x * 1), model.parameters()) == 3 * model[0].weight.nbytes  # type: ignore[union-attr]
