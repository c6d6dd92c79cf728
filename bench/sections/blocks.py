"""Frozen blocks through which a gradient passes: Conv-BN-ReLU and ResNet-50's bottleneck."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from bench.measure import Case
from bench.nets import Bottleneck, conv_bn_relu, freeze
from bench.sections.models import model_tolerance
from bench.settings import Settings

# ResNet-50's four stages: channels of a block, of its 3x3 convolution, height and width.
_STAGES = ((256, 64, 56), (512, 128, 28), (1024, 256, 14), (2048, 512, 7))


def cases(settings: Settings) -> Iterator[Case]:
    """Each block with everything in it frozen, and trainable."""
    batch = settings.batch or (32 if settings.device.type == "cuda" else 1)
    stages = _STAGES[2:] if settings.quick else _STAGES
    bound = model_tolerance(settings)
    for channels, width, size in stages:
        blocks = {
            "Conv-BN-ReLU 3x3": (nn.Sequential(*conv_bn_relu(width, width, 3)), width),
            "bottleneck": (Bottleneck(channels, width), channels),
        }
        for name, (block, inputs) in blocks.items():
            for regime in ("trainable", "frozen"):
                torch.manual_seed(settings.seed)
                module = block.to(settings.device, settings.dtype)
                if regime == "frozen":
                    freeze(module)
                x = torch.randn(
                    batch, inputs, size, size, device=settings.device, dtype=settings.dtype, requires_grad=True
                )
                detail = f"{batch}x{inputs}x{size}x{size}"
                yield Case("blocks", "ResNet-50", name, detail, regime, module, x, lambda name: bound)
