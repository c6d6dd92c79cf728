"""What a fused model runs and keeps: one kernel a layer each way, and bits."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import freezekit as fk
from freezekit import _C
from freezekit.fusion import fuse
from freezekit.nn.pool import MaxPool2d
from tests.fusion.nets import ResNet, settled
from tests.observe import Calls, bytes_kept

# What neither computes on activations nor costs a kernel of their size.
FREE = {
    "aten::detach",
    "aten::view",
    "aten::t",
    "aten::expand",
    "aten::as_strided",
    "aten::as_strided_",
    "aten::ones_like",
}


def between(calls: Calls) -> Counter[str]:
    return Counter({name: count for name, count in calls.count.items() if name not in FREE})


def test_resnet50_runs_one_convolution_kernel_a_layer_and_nothing_between() -> None:
    model = fuse(settled(ResNet((3, 4, 6, 3), width=4, stem=3)))
    layers = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert layers == 53
    x = torch.randn(1, 3, 12, 12).to(memory_format=torch.channels_last).requires_grad_()
    _C.set_launch_log(True)
    try:
        with fk.testing.emulated():
            with Calls() as forward:
                y = model(x)
            launched = Counter(row["operator"] for row in _C.take_launch_log())
            # A norm becomes a scale and a shift in a launch over its channels.
            assert launched == {"conv2d": layers, "norm_affine": layers}
            with Calls() as backward:
                torch.autograd.grad(y, x, torch.ones_like(y))
            launched = Counter(row["operator"] for row in _C.take_launch_log())
            assert launched.pop("gate") <= 2
            # W' is made at each call, with the scale in it.
            assert launched == {"conv2d_dgrad": layers, "norm_affine": layers, "filter_transform": layers}
    finally:
        _C.set_launch_log(False)
    # The rest is the pooling and the classifier; two masks stand where the blocks end: at the pools.
    assert between(forward) == {
        "freezekit::frozen_conv2d": layers,
        "aten::max_pool2d_with_indices": 1,
        "aten::mean.dim": 1,
        "aten::addmm": 1,
    }
    assert backward.count["freezekit::frozen_conv2d_dgrad"] == layers
    assert backward.count["freezekit::gate"] <= 2
    assert not [
        name for name in backward.count if name.startswith(("aten::add", "aten::threshold", "aten::native_batch"))
    ]


def without_classifier(model: ResNet) -> ResNet:
    """A view of the classifier's weight would be counted as if it were kept."""
    model.fc = nn.Identity()
    return model


# A processor without bfloat16 takes a minute for the larger images, of which the same share is kept.
@pytest.mark.parametrize(
    ("dtype", "size", "bound"),
    [(torch.float32, (2, 3, 224, 224), 0.017), (torch.bfloat16, (1, 3, 64, 64), 0.034)],
    ids=["float32", "bfloat16"],
)
def test_resnet101_keeps_bits(dtype: torch.dtype, size: tuple[int, ...], bound: float) -> None:
    stock = settled(without_classifier(ResNet((3, 4, 23, 3)))).to(dtype)
    x = torch.randn(size, dtype=dtype, requires_grad=True)
    kept_by_stock = bytes_kept(stock, x)
    fused = fuse(copy.deepcopy(stock))
    fused.maxpool.__class__ = MaxPool2d  # stock's keeps its input and an int64 an element
    kept = bytes_kept(fused, x)
    assert 0 < kept <= bound * kept_by_stock


def test_a_prefix_that_needs_no_gradient_keeps_nothing() -> None:
    model = fuse(settled(without_classifier(ResNet((1, 1), width=8))))
    x = torch.randn(1, 3, 32, 32)
    model(x)
    assert bytes_kept(model, x) == 0


class Turns(nn.Module):
    """A frozen block and a trainable one in turn, each a module of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(*layers[i : i + 2]) for i in range(0, len(layers), 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def alternating(kind: type[nn.Module], activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), activation(), nn.Conv2d(16, 16, 3), activation(), nn.Conv2d(16, 8, 3), activation()]
    layers[0].requires_grad_(False)
    return kind(*layers)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("kind", [nn.Sequential, Turns])
def test_no_bits_beside_what_a_trainable_convolution_keeps(kind: type[nn.Module], activation: type[nn.Module]) -> None:
    stock = alternating(kind, activation)
    fused = fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    kept = [bytes_kept(model, x) for model in (stock, fused)]
    assert kept[1] <= kept[0]
    gradients = [torch.autograd.grad(m(x).square().sum(), [x, *filter(learns, m.parameters())]) for m in (stock, fused)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def learns(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad


def frozen_then_trainable() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
    return fuse(frozen), fuse(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))


@pytest.mark.parametrize("written", [False, True])
def test_a_result_that_was_written_to_is_not_read(written: bool) -> None:
    """Bits are of what the block made. Stock's ReLU would raise where the convolution behind does not."""
    frozen, trainable = frozen_then_trainable()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    dy = torch.randn(2, 4, 6, 6)
    (expected,) = torch.autograd.grad(frozen(x), x, dy)
    y = frozen(x)
    if written:
        with torch.no_grad():
            y.neg_()
    trainable(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, expected)


def test_a_result_that_is_kept_is_held_as_stock_s() -> None:
    frozen, trainable = frozen_then_trainable()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = frozen(x)
    trainable(y)
    dy = torch.randn(2, 4, 6, 6)
    first, second = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        y.neg_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x, dy)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_through_a_result_that_is_kept(compiled: bool) -> None:
    found = []
    for change in (fuse, fk.unfuse):
        frozen, trainable = map(change, frozen_then_trainable())
        x = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8).requires_grad_()
        y = trainable(frozen(x)).square().sum()
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                y.backward()
            found.append([x.grad, trainable[0].weight.grad])
        else:
            (dx,) = torch.autograd.grad(y, x, create_graph=True)
            found.append([dx, *torch.autograd.grad(dx.square().sum(), [x, trainable[0].weight])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
