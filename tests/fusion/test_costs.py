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
