"""The convolutions of well-known networks, as data: one entry for each distinct shape, with how often it occurs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn


@dataclass(frozen=True)
class LayerShape:
    """A convolution in its place.

    Attributes:
        name: of its first occurrence.
        size: height and width of its input.
        bias: whether it has a bias (else a batch norm follows).
        count: how many layers of the network have this shape.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = False
    count: int = 1

    @property
    def output_size(self) -> int:
        """Height and width of its output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-adds of one forward pass on one image."""
        return self.output_size**2 * self.weights

    @property
    def weights(self) -> int:
        """Elements of its weight."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel**2

    @property
    def shape(self) -> str:
        """For tables: ``64x56x56 -> 128, 3x3 /2``."""
        text = f"{self.in_channels}x{self.size}x{self.size} -> {self.out_channels}, {self.kernel}x{self.kernel}"
        if self.stride > 1:
            text += f" /{self.stride}"
        if self.groups == self.in_channels and self.groups > 1:
            return text + " dw"
        return text + (f" g{self.groups}" if self.groups > 1 else "")

    def module(self, device: torch.device, dtype: torch.dtype) -> nn.Conv2d:
        """The stock layer."""
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel,
            self.stride,
            self.padding,
            groups=self.groups,
            bias=self.bias,
            device=device,
            dtype=dtype,
        )


def _bottlenecks(groups: int, group_width: int) -> Iterator[LayerShape]:
    """ResNet-50 (1, 64) and ResNeXt-50 32x4d (32, 4); the stride is in the 3x3 layer."""
    yield LayerShape("conv1", 3, 64, 7, 224, stride=2, padding=3)
    channels, size = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width, out = groups * group_width << stage, 256 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            place = f"layer{stage + 1}.{block}"
            yield LayerShape(f"{place}.conv1", channels, width, 1, size)
            yield LayerShape(f"{place}.conv2", width, width, 3, size, stride, padding=1, groups=groups)
            yield LayerShape(f"{place}.conv3", width, out, 1, size // stride)
            if not block:
                yield LayerShape(f"{place}.downsample", channels, out, 1, size, stride)
            channels, size = out, size // stride


def _vgg16() -> Iterator[LayerShape]:
    channels, size, index = 3, 224, 0
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            yield LayerShape(f"features.{index}", channels, width, 3, size, padding=1, bias=True)
            channels, index = width, index + 2
        size, index = size // 2, index + 1


def _inverted(
    place: str, channels: int, expanded: int, out: int, kernel: int, stride: int, size: int, squeezed: int
) -> Iterator[LayerShape]:
    """Expand, depthwise, squeeze and excite (`squeezed` channels; 0 for none), project."""
    if expanded != channels:
        yield LayerShape(f"{place}.expand", channels, expanded, 1, size)
    yield LayerShape(f"{place}.depthwise", expanded, expanded, kernel, size, stride, kernel // 2, expanded)
    if squeezed:
        yield LayerShape(f"{place}.squeeze", expanded, squeezed, 1, 1, bias=True)
        yield LayerShape(f"{place}.excite", squeezed, expanded, 1, 1, bias=True)
    yield LayerShape(f"{place}.project", expanded, out, 1, size // stride)


# MobileNetV3-Large: kernel, expanded channels, output channels, squeezed channels, stride.
_MOBILENET = (
    (3, 16, 16, 0, 1),
    (3, 64, 24, 0, 2),
    (3, 72, 24, 0, 1),
    (5, 72, 40, 24, 2),
    (5, 120, 40, 32, 1),
    (5, 120, 40, 32, 1),
    (3, 240, 80, 0, 2),
    (3, 200, 80, 0, 1),
    (3, 184, 80, 0, 1),
    (3, 184, 80, 0, 1),
    (3, 480, 112, 120, 1),
    (3, 672, 112, 168, 1),
    (5, 672, 160, 168, 2),
    (5, 960, 160, 240, 1),
    (5, 960, 160, 240, 1),
)

# EfficientNet-B0: kernel, expansion, output channels, blocks, stride of the first.
_EFFICIENTNET = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)


def _mobilenet_v3() -> Iterator[LayerShape]:
    yield LayerShape("stem", 3, 16, 3, 224, stride=2, padding=1)
    channels, size = 16, 112
    for index, (kernel, expanded, out, squeezed, stride) in enumerate(_MOBILENET):
        yield from _inverted(f"block{index}", channels, expanded, out, kernel, stride, size, squeezed)
        channels, size = out, size // stride
    yield LayerShape("last", 160, 960, 1, 7)


def _efficientnet_b0() -> Iterator[LayerShape]:
    yield LayerShape("stem", 3, 32, 3, 224, stride=2, padding=1)
    channels, size = 32, 112
    for stage, (kernel, expansion, out, blocks, first_stride) in enumerate(_EFFICIENTNET):
        for block in range(blocks):
            stride = 1 if block else first_stride
            place, expanded = f"stage{stage}.{block}", channels * expansion
            yield from _inverted(place, channels, expanded, out, kernel, stride, size, channels // 4)
            channels, size = out, size // stride
    yield LayerShape("last", 320, 1280, 1, 7)


def _convnext_tiny() -> Iterator[LayerShape]:
    """Its pointwise layers are linear in torchvision, so they are not here."""
    yield LayerShape("stem", 3, 96, 4, 224, stride=4, bias=True)
    size = 56
    for stage, (width, blocks) in enumerate(((96, 3), (192, 3), (384, 9), (768, 3))):
        if stage:
            yield LayerShape(f"downsample{stage}", width // 2, width, 2, size, stride=2, bias=True)
            size //= 2
        for block in range(blocks):
            yield LayerShape(f"stage{stage}.{block}", width, width, 7, size, padding=3, groups=width, bias=True)


_NETWORKS: dict[str, Callable[[], Iterator[LayerShape]]] = {
    "resnet50": lambda: _bottlenecks(1, 64),
    "resnext50": lambda: _bottlenecks(32, 4),
    "vgg16": _vgg16,
    "mobilenet_v3": _mobilenet_v3,
    "efficientnet_b0": _efficientnet_b0,
    "convnext_tiny": _convnext_tiny,
    # Twelve for a first quarter of an hour on a GPU: each stands for a kind or a size of those networks.
    "dozen": lambda: iter(
        (
            LayerShape("stem 7x7", 3, 64, 7, 224, stride=2, padding=3),
            LayerShape("3x3, large image", 64, 64, 3, 56, padding=1),
            LayerShape("3x3, strided", 128, 128, 3, 56, stride=2, padding=1),
            LayerShape("3x3, small image", 512, 512, 3, 7, padding=1),
            LayerShape("1x1, wide out", 64, 256, 1, 56),
            LayerShape("1x1, wide in", 1024, 256, 1, 14),
            LayerShape("1x1, strided", 1024, 2048, 1, 14, stride=2),
            LayerShape("3x3, 32 groups", 128, 128, 3, 56, padding=1, groups=32),
            LayerShape("depthwise 3x3", 72, 72, 3, 56, padding=1, groups=72),
            LayerShape("depthwise 5x5, strided", 672, 672, 5, 14, stride=2, padding=2, groups=672),
            LayerShape("depthwise 7x7", 384, 384, 7, 14, padding=3, groups=384, bias=True),
            LayerShape("2x2, strided", 192, 384, 2, 28, stride=2, bias=True),
        )
    ),
    # Four shapes that a test or a first look can afford.
    "tiny": lambda: iter(
        (
            LayerShape("dense", 8, 16, 3, 12, padding=1),
            LayerShape("pointwise", 16, 8, 1, 12, bias=True),
            LayerShape("strided", 8, 8, 3, 12, stride=2, padding=1),
            LayerShape("depthwise", 8, 8, 3, 12, padding=1, groups=8),
        )
    ),
}

NAMES = tuple(_NETWORKS)
NETWORKS = tuple(name for name in NAMES if name not in ("dozen", "tiny"))


def layers_of(network: str) -> list[LayerShape]:
    """The distinct convolutions of a network in order of first occurrence.

    Raises:
        ValueError: if the network is not in NAMES.

    >>> layers_of("resnet50")[0].shape, sum(layer.count for layer in layers_of("resnet50"))
    ('3x224x224 -> 64, 7x7 /2', 53)
    """
    if network not in _NETWORKS:
        raise ValueError(f"layer list must be one of {', '.join(NAMES)}, got {network!r}")
    distinct: dict[LayerShape, LayerShape] = {}
    for layer in _NETWORKS[network]():
        key = replace(layer, name="")
        seen = distinct.get(key)
        distinct[key] = replace(seen, count=seen.count + 1) if seen else layer
    return list(distinct.values())
