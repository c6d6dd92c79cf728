"""Models in the shapes that people write them in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        mid = out // 4
        self.conv1, self.bn1 = nn.Conv2d(channels, mid, 1, bias=False), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = nn.Conv2d(mid, mid, 3, stride, 1, bias=False), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = nn.Conv2d(mid, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class BasicBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(out)))


class PreActivation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(torch.relu(self.bn1(x)))
        return self.conv2(torch.relu(self.bn2(out))) + x


class Functional(nn.Module):
    """No BatchNorm, functions for everything else, and a convolution whose sum has two."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 1)
        self.c = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.add(self.a(x), self.b(x)).relu_()
        return torch.flatten(F.relu6(self.c(y)), 1)


class ResNet(nn.Module):
    def __init__(self, depths: tuple[int, ...], width: int = 64, stem: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, stem, 2, stem // 2, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, channels = [], width
        for i, depth in enumerate(depths):
            out = 4 * width * 2**i
            blocks = [Bottleneck(channels if j == 0 else out, out, 2 if i and j == 0 else 1) for j in range(depth)]
            stages.append(nn.Sequential(*blocks))
            channels = out
        self.layers = nn.ModuleList(stages)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.layers:
            x = stage(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def separable(channels: int) -> nn.Sequential:
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, 2 * channels, 1, bias=False)
    return nn.Sequential(
        depthwise, nn.BatchNorm2d(channels), nn.ReLU6(), pointwise, nn.BatchNorm2d(2 * channels), nn.ReLU6(inplace=True)
    )


def plain(depth: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def settled(model: nn.Module) -> nn.Module:
    """Frozen, in eval mode, with statistics and affine parameters that are not the trivial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return model.eval().requires_grad_(False)


PATTERNS = {
    "plain": lambda: plain(3, 8),
    "basic": lambda: nn.Sequential(BasicBlock(8), BasicBlock(8)),
    "bottleneck": lambda: nn.Sequential(Bottleneck(8, 16), Bottleneck(16, 16), Bottleneck(16, 16, stride=2)),
    "separable": lambda: separable(8),
    "preactivation": lambda: nn.Sequential(PreActivation(8), PreActivation(8)),
    "functional": lambda: Functional(8),
}
