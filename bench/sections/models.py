"""A training step of a small residual network in the regimes that people train in: time and peak memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.measure import Case
from bench.nets import PARTS as NET_PARTS
from bench.nets import REGIMES, SmallResNet, enter, freeze_depth
from bench.settings import Settings

_FEW = ("all trainable", "first half frozen", "second half frozen")


def model_tolerance(settings: Settings) -> float:
    """Roundings grow through some twenty layers, and a ReLU may fall on either side of zero.

    A thousand roundings leaves room for both (stock against itself in channels_last stays below a fifth of it); a
    wrong kernel is off by the size of the gradient itself.
    """
    return min(0.3, 1000 * (2.0**-10 / 8 if settings.tf32 else torch.finfo(settings.dtype).eps))


def cases(settings: Settings) -> Iterator[Case]:
    """The training step in each regime: three of them where all sections run, every one where asked for."""
    for regime in REGIMES if settings.thorough else _FEW:
        yield step_case("models", regime, None, settings)


def depth_cases(settings: Settings) -> Iterator[Case]:
    """The input learns and the last parts are frozen: one after the other, up to all eight."""
    for depth in range(NET_PARTS + 1):
        yield step_case("memory", f"{depth} of {NET_PARTS} parts frozen, input learns", depth, settings)


def scaling_cases(settings: Settings) -> Iterator[Case]:
    """The surgical regime over batch and over image size."""
    batch, size = defaults(settings)
    for b in (max(batch // 4, 1), max(batch // 2, 1), batch):
        yield step_case("scaling", "second half frozen", None, settings, batch=b, by="batch")
    for s in (size // 2, size, 2 * size):
        yield step_case("scaling", "second half frozen", None, settings, size=s, by="image size")


def defaults(settings: Settings) -> tuple[int, int]:
    """Images a batch, and their height and width."""
    cuda = settings.device.type == "cuda"
    batch = settings.batch or (128 if cuda else 4 if settings.quick else 8)
    return batch, 128 if cuda else 32 if settings.quick else 64


def step_case(
    section: str,
    regime: str,
    depth: int | None,
    settings: Settings,
    *,
    batch: int | None = None,
    size: int | None = None,
    by: str = "",
) -> Case:
    """One training step: forward, loss, backward, SGD."""
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
        "training step",
        f"width {width}, {batch}x3x{size}x{size}",
        regime,
        model,
        x,
        lambda name: bound,
        x=float(depth) if depth is not None else {"batch": batch, "image size": size}.get(by),
        learning_rate=1e-4,
    )
