"""Strides: what freezekit makes of a tensor is laid out as what torch makes of it, whatever the layouts of x and dy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freezekit as fk
from tests.enabled.helpers import tolerance

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(t: Tensor) -> Tensor:
    if t.dim() in FORMATS:
        return torch.empty_like(t, memory_format=FORMATS[t.dim()]).copy_(t)
    return t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 1 else t


def odd(t: Tensor) -> Tensor:
    """Along axes of size 1 any stride will do."""
    return t.as_strided(t.shape, [7 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)])


def swapped(t: Tensor, a: int, b: int) -> Tensor:
    return t.transpose(a, b).contiguous().transpose(a, b) if t.dim() > 1 else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": channels_last,
    "odd": odd,
    "channels_last, odd": lambda t: odd(channels_last(t)),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "channels_last, sliced": lambda t: channels_last(torch.cat([t, t], -1))[..., : t.shape[-1]],
    "batch inside": lambda t: swapped(t, 0, 1),
    "columns first": lambda t: swapped(t, -1, -2),
    "expanded": lambda t: t[:, :1].expand(t.shape) if t.dim() > 1 else t,
    "one for the batch": lambda t: t[:1].expand(t.shape),
}

OF_DY = ("contiguous", "channels_last", "odd", "channels_last, sliced", "columns first", "expanded")


@dataclass(frozen=True)
class Case:
    """A layer for so many channels, and the sizes of its inputs."""

    name: str
    layer: Callable[[int], nn.Module]
    sizes: tuple[tuple[int, ...], ...]


def frozen(kind: Callable[..., nn.Module], *args: Any, wide: bool = False, **kw: Any) -> Callable[[int], nn.Module]:
    """`kind` of (the channels, *args); wide: with a weight in channels_last."""

    def layer(channels: int) -> nn.Module:
        torch.manual_seed(0)
        made = kind(channels, *args, **kw).eval().requires_grad_(False)
        for p in made.parameters():
            if wide:
                p.data = channels_last(p.data)
        if isinstance(made, nn.modules.batchnorm._BatchNorm):
            made.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        return made

    return layer


IMAGES = (
    (2, 4, 6, 6),
    (2, 1, 6, 6),
    (1, 4, 6, 6),
    (2, 4, 1, 6),
    (2, 4, 6, 1),
    (2, 4, 1, 1),
    (1, 1, 6, 6),
    (0, 4, 6, 6),
)
ANY = (*IMAGES, (2, 1, 1, 1), (3, 4), (5,), (2, 4, 6), (2, 2, 3, 4, 4))
PLANES = ((2, 4, 6, 6), (2, 1, 6, 6), (1, 4, 6, 6), (2, 4, 3, 6), (2, 4, 3, 3), (2, 1, 3, 3), (0, 4, 6, 6))
ROWS = ((2, 4, 6), (2, 1, 6), (1, 4, 6), (2, 4, 3))
VOLUMES = ((2, 3, 4, 4, 4), (2, 1, 4, 4, 4), (1, 3, 4, 4, 4), (2, 3, 2, 2, 2))


def plain(name: str, module: nn.Module, sizes: tuple[tuple[int, ...], ...]) -> Case:
    return Case(name, lambda _: module, sizes)


ACTIVATIONS = [
    plain("relu", nn.ReLU(), ANY),
    plain("relu_", nn.ReLU(inplace=True), ANY),
    plain("relu6", nn.ReLU6(), ANY),
    plain("hardtanh_", nn.Hardtanh(-0.5, 0.7, inplace=True), ANY),
    plain("leaky_relu", nn.LeakyReLU(0.1), ANY),
    plain("leaky_relu_", nn.LeakyReLU(0.1, inplace=True), ANY),
    plain("threshold", nn.Threshold(0.2, -1), ANY),
    plain("threshold_", nn.Threshold(0.2, -1, inplace=True), ANY),
    plain("dropout", nn.Dropout(0.4), ANY),
    plain("dropout_", nn.Dropout(0.4, inplace=True), ANY),
    Case("prelu", lambda _: nn.PReLU().requires_grad_(False), ANY),
    Case("prelu of channels", lambda c: nn.PReLU(c).requires_grad_(False), IMAGES),
]
NORMS = [
    Case("batch_norm1d", frozen(nn.BatchNorm1d), (*ROWS, (3, 4), (2, 4, 1))),
    Case("batch_norm2d", frozen(nn.BatchNorm2d), IMAGES[:-1]),
    Case("batch_norm2d without parameters", frozen(nn.BatchNorm2d, affine=False), IMAGES[:3]),
    Case("batch_norm3d", frozen(nn.BatchNorm3d), (*VOLUMES, (2, 4, 1, 1, 1))),
]
POOLS = [
    plain("max_pool1d", nn.MaxPool1d(2), (*ROWS, (2, 4, 2), (4, 6))),
    plain("max_pool1d, indices", nn.MaxPool1d(2, return_indices=True), (*ROWS, (2, 4, 2))),
    plain("max_pool2d", nn.MaxPool2d(3, 1, 1), PLANES),
    plain("max_pool2d of all", nn.MaxPool2d(3), PLANES),
    plain("max_pool2d, indices", nn.MaxPool2d(3, return_indices=True), (*PLANES, (4, 6, 6))),
    plain("max_pool3d", nn.MaxPool3d(2), (*VOLUMES, (3, 4, 4, 4))),
    plain("max_pool3d, indices", nn.MaxPool3d(2, return_indices=True), (*VOLUMES, (3, 4, 4, 4))),
    plain("avg_pool1d", nn.AvgPool1d(2), ROWS),
    plain("avg_pool2d", nn.AvgPool2d(3), (*PLANES, (4, 6, 6))),
    plain("avg_pool3d", nn.AvgPool3d(2), (*VOLUMES, (3, 4, 4, 4))),
    plain("adaptive_avg_pool1d", nn.AdaptiveAvgPool1d(2), ROWS),
    plain("adaptive_avg_pool2d", nn.AdaptiveAvgPool2d((2, 1)), (*PLANES, (4, 6, 6))),
    plain("adaptive_avg_pool3d", nn.AdaptiveAvgPool3d((2, 1, 2)), (*VOLUMES, (3, 4, 4, 4))),
]
PADS = [
    plain("reflection_pad1d", nn.ReflectionPad1d(1), ROWS),
    plain("reflection_pad2d", nn.ReflectionPad2d((1, 1, 1, 0)), (*PLANES, (4, 6, 6))),
    plain("reflection_pad3d", nn.ReflectionPad3d(1), (*VOLUMES, (3, 4, 4, 4))),
    plain("replication_pad1d", nn.ReplicationPad1d(1), ROWS),
    plain("replication_pad2d", nn.ReplicationPad2d((1, 1, 1, 0)), (*PLANES, (4, 6, 6))),
    plain("replication_pad3d", nn.ReplicationPad3d(1), (*VOLUMES, (3, 4, 4, 4))),
]
CONVOLUTIONS = [
    Case(f"{kind.__name__} to {filters}{' in channels_last' * wide}", frozen(kind, filters, *args, wide=wide), sizes)
    for kind, args, sizes in (
        (nn.Conv1d, (3,), ROWS),
        (nn.ConvTranspose1d, (3, 2), ROWS),
        (nn.Conv2d, (3,), PLANES),
        (nn.Conv2d, (1,), (*PLANES, (2, 4, 1, 1))),
        (nn.Conv2d, (3, 2, 1), PLANES[:3]),
        (nn.ConvTranspose2d, (3, 2), PLANES),
        (nn.Conv3d, (2,), VOLUMES),
        (nn.ConvTranspose3d, (2,), VOLUMES),
    )
    for filters in (1, 6)
    for wide in ((False, True) if len(sizes[0]) > 3 else (False,))
]
CASES = [*ACTIVATIONS, *NORMS, *POOLS, *PADS, *CONVOLUTIONS]


def run(layer: nn.Module, x: Tensor, of_dy: Callable[[Tensor], Tensor]) -> list[Tensor] | str:
    """Results and the gradient of x, whose dy is laid out so; or the error."""
    torch.manual_seed(0)
    leaf = x.detach().requires_grad_()
    try:
        made = layer(leaf * 1 if getattr(layer, "inplace", False) else leaf)
        results = list(made) if isinstance(made, tuple) else [made]
        dy = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(2))
        return [y.detach() for y in results] + list(torch.autograd.grad(results[0], leaf, of_dy(dy)))
    except RuntimeError as error:
        return str(error)


def runs_of(
    layer: nn.Module, size: tuple[int, ...], every: bool, dense: bool = False
) -> Iterator[tuple[str, list[Tensor] | str]]:
    """every: with each layout of dy, else a contiguous dy and one that changes; dense: the same values, contiguous."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    for i, (name, lay_out) in enumerate(LAYOUTS.items()):
        laid_out = lay_out(x)
        given = torch.empty(size).copy_(laid_out) if dense else laid_out
        for of_dy in OF_DY if every else dict.fromkeys((OF_DY[0], OF_DY[(i + sum(size)) % len(OF_DY)])):
            made = (lambda dy, how=LAYOUTS[of_dy]: how(dy).contiguous()) if dense else LAYOUTS[of_dy]
            yield f"{size} {name} {laid_out.stride()}, dy {of_dy}", run(layer, given, made)


def is_refused(case: Case, size: tuple[int, ...], stock: list[Tensor] | str) -> bool:
    """Torch has no gradient for one volume where dy suggests channels_last, and freezekit has."""
    return case.name.startswith("max_pool3d") and len(size) == 4 and "Unsupported memory format" in stock


def differences(case: Case, way: str, every: bool) -> Iterator[str]:
    for size in case.sizes:
        layer = case.layer(size[1] if len(size) > 1 else 1)
        expected = list(runs_of(layer, size, every))
        # Torch's gradient of a batch norm is wrong on some strides of a batch of one.
        values = list(runs_of(layer, size, every, dense=True)) if case.name.startswith("batch_norm") else expected
        if way == "enabled":
            with fk.enabled():
                found = list(runs_of(layer, size, every))
        else:
            found = list(runs_of(fk.convert(copy.deepcopy(layer)), size, every))
        for (what, stock), (_, of_values), (_, ours) in zip(expected, values, found, strict=True):
            if isinstance(stock, str) or isinstance(ours, str):
                if ours != stock and not is_refused(case, size, stock):
                    yield f"{what}: {ours}, torch: {stock}"
                continue
            strides, torch_s = [t.stride() for t in ours], [t.stride() for t in stock]
            if strides != torch_s:
                yield f"{what}: {strides}, torch: {torch_s}"
            for a, b in zip(ours, of_values, strict=True):
                torch.testing.assert_close(a, b, **tolerance(b), msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)], ids=["some", "every"])
@pytest.mark.parametrize("way", ["enabled", "converted"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_strides_are_torch_s(case: Case, way: str, every: bool) -> None:
    found = list(differences(case, way, every))
    assert not found, f"{len(found)} differ:\n" + "\n".join(found[:20])
