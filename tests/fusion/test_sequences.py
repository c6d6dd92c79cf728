"""Sequences are looked into: what stands in one and what stands behind it are fused together, while nobody can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from freezekit import _C
from freezekit.fusion import fuse, fusion_report, unfuse
from tests.fusion.nets import plain, settled

FUSED = "FreezekitFrozenConv2dBackward"


class ConvNorm(nn.Sequential):
    """As torchvision has it: a sequence with a constructor of its own."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels), nn.ReLU6(inplace=True))


class Inverted(nn.Module):
    """An addition behind a sequence of sequences."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        last = [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.conv = nn.Sequential(ConvNorm(channels), ConvNorm(channels, groups=channels), *last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.block(x) + x)


def outcome(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return y, torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))[0]


def check(model: nn.Module) -> None:
    """Fused and not are one."""
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    ours = outcome(model, x)
    theirs = outcome(unfuse(copy.deepcopy(model)), x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_addition_behind_a_sequence_is_part_of_the_block() -> None:
    model = fuse(settled(Residual(4)).double())
    assert [str(row) for row in fusion_report(model)] == ["block.0 + block.1 + add + relu: fused"]
    check(model)
    y = model(torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True))
    assert y.grad_fn.name() == FUSED


def test_sequences_in_sequences() -> None:
    model = fuse(settled(nn.Sequential(Inverted(4), Inverted(4))).double())
    parts = ("conv.0.0 + {}conv.0.1 + relu6", "conv.1.0 + {}conv.1.1 + relu6", "conv.2 + {}conv.3 + add")
    expected = [f"{i}.{part.format(f'{i}.')}: fused" for i in (0, 1) for part in parts]
    assert [str(row) for row in fusion_report(model)] == expected
    check(model)


def test_kernels_run_once_a_layer() -> None:
    model = fuse(settled(Inverted(8)))
    x = torch.randn(1, 8, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    with fk.testing.emulated():
        model(x)
        _C.set_launch_log(True)
        try:
            y = model(x)
            torch.autograd.grad(y, x, torch.ones_like(y))
            launched = [row["operator"] for row in _C.take_launch_log()]
        finally:
            _C.set_launch_log(False)
    convolutions = [operator for operator in launched if operator.startswith("conv2d")]
    assert convolutions == ["conv2d"] * 3 + ["conv2d_dgrad"] * 3
    # Beside them only what makes a norm's scale and shift, each way, and the filters that dgrad reads.
    assert set(launched) - set(convolutions) == {"norm_affine", "filter_transform"}


def hooked(model: Residual) -> Callable[[], int]:
    calls: list[int] = []
    model.block.register_forward_hook(lambda *_: calls.append(1))
    return lambda: len(calls)


def test_hooks_on_a_sequence_run_whenever_they_came() -> None:
    for early in (True, False):
        model = settled(Residual(4)).double()
        count = hooked(model) if early else lambda: 0
        fuse(model)
        model(torch.randn(1, 4, 5, 5, dtype=torch.float64))
        if not early:
            count = hooked(model)
        before = count()
        check(model)
        assert count() > before
        model.block._forward_hooks.clear()
        check(model)
        assert fusion_report(fuse(model))[0].residual


def test_hooks_for_all_modules_see_the_sequence() -> None:
    model, seen = fuse(settled(Residual(4))), []
    x = torch.randn(1, 4, 5, 5)
    model(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(x)
        fuse(copy.deepcopy(model))(x)
    finally:
        handle.remove()
    assert seen.count(model.block) == 1
    seen.clear()
    model(x)
    assert not seen


CHANGES: dict[str, Callable[[Residual], object]] = {
    "appended": lambda m: m.block.append(nn.Sigmoid()),
    "removed": lambda m: m.block.pop(1),
    "another layer": lambda m: m.block.__setitem__(1, nn.Tanh()),
    "another convolution": lambda m: m.block.__setitem__(0, nn.Conv2d(4, 4, 1).double().requires_grad_(False)),
    "another sequence": lambda m: setattr(m, "block", settled(plain(2, 4)).double()),
    "no sequence": lambda m: setattr(m, "block", nn.Identity()),
    "a forward of its own": lambda m: setattr(m.block, "forward", lambda x: x * 2),
    "converted": fk.convert,
    "thawed": lambda m: m.requires_grad_(True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_sequence_may_change(name: str) -> None:
    model = fuse(settled(Residual(4)).double())
    check(model)
    CHANGES[name](model)
    check(model)


class Doubling(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_sequence_that_does_more_stays_a_leaf() -> None:
    model = settled(Residual(4)).double()
    model.block = Doubling(*model.block)
    fuse(model)
    assert not any(row.residual for row in fusion_report(model))
    check(model)


class Iterating(nn.Module):
    """Runs a sequence's layers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.relu(x)


def test_a_sequence_that_is_iterated_over_is_watched() -> None:
    model = fuse(settled(Iterating()).double())
    assert str(fusion_report(model)[0]) == "layers.0 + layers.1 + relu: fused"
    check(model)
    model.layers.append(nn.Tanh())
    check(model)


def test_compiles_whole() -> None:
    model = fuse(settled(nn.Sequential(Inverted(4), Residual(4))).double())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    for a, b in zip(outcome(compiled, x), outcome(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
