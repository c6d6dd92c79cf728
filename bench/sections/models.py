"""A training step of a small residual network in the regimes that people train in: time and peak memory.

And blocks through which a gradient passes, trainable and frozen: Conv-BN-ReLU and ResNet-50's bottleneck.
"""

from functools import partial

import torch
from torch import nn

from bench.measure import Case, MakeCase
from bench.nets import PARTS as NET_PARTS
from bench.nets import REGIMES, Bottleneck, SmallResNet, conv_bn_relu, enter, freeze, freeze_depth
from bench.settings import Settings

_FEW = ("all trainable", "first half frozen", "second half frozen")


def model_tolerance(settings: Settings) -> float:
    """How far results of a whole network may differ by rounding, relative to the largest element of each.

    What a ReLU adds when its pre-activation rounds to the other side of zero is measured in stock itself: see
    bench.verify. Half precision rounds so much that this bound catches only gross errors of a network; single layers
    are held to rounding alone, in a section of their own.
    """
    if settings.dtype is torch.float64:
        return 1e-9
    return 1e-3 if settings.dtype is torch.float32 and not settings.tf32 else 0.3


def cases(settings: Settings) -> list[MakeCase]:
    """The training step in each regime; in three of them unless all were asked for."""
    return [partial(step_case, "models", regime, settings) for regime in (REGIMES if settings.thorough else _FEW)]


def depth_cases(settings: Settings) -> list[MakeCase]:
    """The input learns while more and more of the last parts are frozen, up to all (by fours in a quick run)."""
    depths = range(0, NET_PARTS + 1, 4 if settings.quick else 1)
    return [
        partial(step_case, "memory", f"last {depth} of {NET_PARTS} frozen", settings, depth=depth) for depth in depths
    ]


def scaling_cases(settings: Settings) -> list[MakeCase]:
    """The surgical regime over batch and over image size."""
    batch, size = defaults(settings)
    step = partial(step_case, "scaling", "second half frozen", settings)
    by_batch = [partial(step, batch=b, by="batch") for b in sorted({max(batch // 4, 1), max(batch // 2, 1), batch})]
    return [*by_batch, *(partial(step, size=s, by="image size") for s in (size // 2, size, 2 * size))]


def defaults(settings: Settings) -> tuple[int, int]:
    """Images per batch, and their height and width."""
    cuda = settings.device.type == "cuda"
    batch = settings.batch or (128 if cuda else 2 if settings.quick else 8)
    return batch, 128 if cuda else 32 if settings.quick else 64


def step_case(
    section: str,
    regime: str,
    settings: Settings,
    *,
    depth: int | None = None,
    batch: int | None = None,
    size: int | None = None,
    by: str = "",
) -> Case:
    """One training step: forward, loss, backward, SGD.

    `regime` is one of nets.REGIMES; where `depth` is given, that many parts are frozen from the end and it is a label.
    """
    torch.manual_seed(settings.seed)
    default_batch, default_size = defaults(settings)
    batch, size = batch or default_batch, size or default_size
    width = 64 if settings.device.type == "cuda" else 16
    model = SmallResNet(width).to(settings.device, settings.dtype)
    if depth is None:
        input_learns = enter(model, regime)
    else:
        freeze_depth(model, depth)
        input_learns = True
    x = torch.randn(batch, 3, size, size, device=settings.device, dtype=settings.dtype, requires_grad=input_learns)
    bound = model_tolerance(settings)
    return Case(
        section,
        f"small ResNet by {by}" if by else "small ResNet",
        "step",
        f"width {width}, {batch}x3x{size}x{size}",
        regime,
        model,
        x,
        lambda name: bound,
        x=float(depth) if depth is not None else {"batch": batch, "image size": size}.get(by),
        learning_rate=1e-4,
        kinks=True,
    )


# ResNet-50's four stages: channels of a block, of its 3x3 convolution, height and width.
_STAGES = ((256, 64, 56), (512, 128, 28), (1024, 256, 14), (2048, 512, 7))
_KINDS = ("Conv-BN-ReLU 3x3", "bottleneck")


def block_cases(settings: Settings) -> list[MakeCase]:
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
