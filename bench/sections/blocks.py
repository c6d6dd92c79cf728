"""Blocks through which a gradient passes, trainable and frozen: Conv-BN-ReLU and ResNet-50's bottleneck."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from bench.measure import Case, MakeCase
from bench.nets import Bottleneck, conv_bn_relu, freeze
from bench.sections.models import model_tolerance
from bench.settings import Settings

# ResNet-50's four stages: channels of a block, of its 3x3 convolution, height and width.
_STAGES = ((256, 64, 56), (512, 128, 28), (1024, 256, 14), (2048, 512, 7))
_KINDS = ("Conv-BN-ReLU 3x3", "bottleneck")


def cases(settings: Settings) -> list[MakeCase]:
    """Each block of each stage (in a quick run only of the last), trainable and with everything in it frozen."""
    return [
        partial(block_case, kind, stage, regime, settings)
        for stage in (_STAGES[3:] if settings.quick else _STAGES)
        for kind in _KINDS
        for regime in ("trainable", "frozen")
    ]


def block_case(kind: str, stage: tuple[int, int, int], regime: str, settings: Settings) -> Case:
    """One block; its input learns in both regimes."""
    torch.manual_seed(settings.seed)
    channels, width, size = stage
    batch = settings.batch or (32 if settings.device.type == "cuda" else 1)
    block: nn.Module = Bottleneck(channels, width)
    if kind == "Conv-BN-ReLU 3x3":
        block, channels = nn.Sequential(*conv_bn_relu(width, width, 3)), width
    block.to(settings.device, settings.dtype)
    if regime == "frozen":
        freeze(block)
    x = torch.randn(batch, channels, size, size, device=settings.device, dtype=settings.dtype, requires_grad=True)
    bound = model_tolerance(settings)
    detail = f"{batch}x{channels}x{size}x{size}"
    return Case("blocks", "ResNet-50", kind, detail, regime, block, x, lambda name: bound, kinks=True)
