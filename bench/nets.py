"""Small networks that a CPU trains in a fraction of a second, and the regimes that people freeze them in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk


class BasicBlock(nn.Module):
    """ResNet's two-convolution block."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """ResNet-50's three-convolution block, of `channels` in and out."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn_relu(channels, width, 1),
            *conv_bn_relu(width, width, 3),
            nn.Conv2d(width, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + x)


def conv_bn_relu(channels: int, out: int, kernel: int) -> list[nn.Module]:
    """The three layers of one step, size kept."""
    return [nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


class SmallResNet(nn.Module):
    """A ResNet of six basic blocks (13 3x3 and two 1x1 convolutions), its loss included: forward gives one number."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn_relu(3, width, 3))
        self.stages = nn.Sequential(
            BasicBlock(width, width, 1),
            BasicBlock(width, width, 1),
            BasicBlock(width, 2 * width, 2),
            BasicBlock(2 * width, 2 * width, 1),
            BasicBlock(2 * width, 4 * width, 2),
            BasicBlock(4 * width, 4 * width, 1),
        )
        self.head = nn.Linear(4 * width, classes)
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(self.stem(x)).mean((2, 3))
        labels = torch.arange(len(x), device=x.device) % self.classes
        return F.cross_entropy(self.head(features), labels)


def freeze(module: nn.Module) -> None:
    """Freezes parameters, and batch norms' statistics with them."""
    module.requires_grad_(False)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


REGIMES = (
    "all trainable",
    "first half frozen",
    "second half frozen",
    "bias only",
    "norm only",
    "head only",
    "all frozen, input learns",
    "all frozen",
)


def enter(model: SmallResNet, regime: str) -> bool:
    """Puts the model in a regime; returns whether its input needs a gradient.

    "second half frozen" is surgical fine-tuning: early layers learn, so every frozen layer's dgrad is needed. So it is
    where only biases or norms learn, or a prompt at the input does. With the first half frozen, backward never reaches
    it. "all frozen" has no backward pass: there remains a forward pass that must keep nothing.

    Raises:
        ValueError: if the regime is not in REGIMES.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {', '.join(REGIMES)}, got {regime!r}")
    if regime == "first half frozen":
        freeze(model.stem)
        freeze(model.stages[:3])
    elif regime == "second half frozen":
        freeze(model.stages[3:])
    elif regime == "bias only":
        freeze(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    elif regime == "norm only":
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.requires_grad_(False)
    elif regime == "head only":
        freeze(model.stem)
        freeze(model.stages)
    elif regime.startswith("all frozen"):
        freeze(model)
    return regime == "all frozen, input learns"


def freeze_depth(model: SmallResNet, depth: int) -> None:
    """Freezes the last `depth` of the network's eight parts (stem, six blocks, head) while the input learns."""
    parts: list[nn.Module] = [model.stem, *model.stages, model.head]
    for part in parts[len(parts) - depth :]:
        freeze(part)


PARTS = 8


def converted_resnet() -> tuple[nn.Module, Tensor]:
    """For the shell: ``freezekit plan bench.nets:converted_resnet --measure``."""
    torch.manual_seed(0)
    return fk.convert(SmallResNet(16)), torch.randn(8, 3, 64, 64)
