"""The layer lists are those of the networks: their weights add up to the published parameter counts."""

from __future__ import annotations

import pytest
import torch

from bench.layer_lists import NAMES, LayerShape, layers_of
from bench.sections.layers import work
from bench.work import count

# Parameters of torchvision's models without their classifiers: convolutions, and two a channel of batch norms.
PUBLISHED = {
    "resnet50": 25_557_032 - 2_049_000,
    "resnext50": 25_028_904 - 2_049_000,
    "vgg16": 138_357_544 - 123_642_856,
    "mobilenet_v3": 5_483_032 - (960 * 1280 + 1280) - (1280 * 1000 + 1000),
    "efficientnet_b0": 5_288_548 - 1_281_000,
}


@pytest.mark.parametrize("network", PUBLISHED)
def test_parameters_add_up(network: str) -> None:
    total = sum(
        layer.count * (layer.weights + layer.out_channels * (1 if layer.bias else 2)) for layer in layers_of(network)
    )
    assert total == PUBLISHED[network]


def test_convnext_has_its_depthwise_layers() -> None:
    depthwise = [layer for layer in layers_of("convnext_tiny") if layer.groups > 1]
    assert [(layer.in_channels, layer.kernel, layer.size, layer.count) for layer in depthwise] == [
        (96, 7, 56, 3),
        (192, 7, 28, 3),
        (384, 7, 14, 9),
        (768, 7, 7, 3),
    ]


@pytest.mark.parametrize("network", NAMES)
def test_modules_are_what_the_entries_say(network: str) -> None:
    for layer in layers_of(network):
        module = layer.module(torch.device("meta"), torch.float32)
        y = module(torch.empty(1, layer.in_channels, layer.size, layer.size, device="meta"))
        assert y.shape == (1, layer.out_channels, layer.output_size, layer.output_size)
        assert module.weight.numel() == layer.weights


def test_work_counts_two_operations_a_product() -> None:
    layer = layers_of("resnet50")[0]
    assert work(layer, 2, "fprop", "frozen", 4).flops == 2 * 2 * 112 * 112 * 64 * 3 * 49
    assert work(layer, 2, "step", "trainable", 4).flops == 3 * work(layer, 2, "fprop", "frozen", 4).flops
    elements = 2 * 3 * 224 * 224 + 2 * 64 * 112 * 112 + 64 * 3 * 49
    assert work(layer, 2, "dgrad", "frozen", 4).traffic == 4 * elements


@pytest.mark.parametrize("part", ["step", "fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("layer", layers_of("tiny"), ids=lambda layer: layer.name)
def test_work_is_what_is_counted_in_a_step(layer: LayerShape, part: str) -> None:
    module = layer.module(torch.device("cpu"), torch.float32)
    x = torch.randn(2, layer.in_channels, layer.size, layer.size, requires_grad=True)
    y = module(x).sum()
    steps = {
        "step": lambda: torch.autograd.grad(module(x).sum(), [x, module.weight]),
        "fprop": lambda: module(x),
        "dgrad": lambda: torch.autograd.grad(y, x),
        "wgrad": lambda: torch.autograd.grad(y, module.weight),
    }
    counted, expected = count(steps[part]), work(layer, 2, part, "trainable", 4)
    bias = layer.out_channels * 4 if layer.bias and part in ("step", "fprop") else 0
    assert counted.flops == expected.flops
    assert counted.traffic == expected.traffic + bias


def test_unknown_list_is_named() -> None:
    with pytest.raises(ValueError, match=r"one of resnet50.*got 'resnet5'"):
        layers_of("resnet5")
