"""Fused blocks give results and gradients the strides that torch's layers give them: dropout behind them draws in that
order, and `view` takes one and refuses another.
"""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from freezekit.fusion import fusion_report

NCHW, NHWC = torch.contiguous_format, torch.channels_last


def chain(mode: str) -> nn.Sequential:
    """Two blocks, so that one result is read by a block alone."""
    layers = [nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_strides_and_what_dropout_drops(mode: str, dtype: torch.dtype) -> None:
    for weight, data in product((NCHW, NHWC), (NCHW, NHWC)):
        net = chain(mode).to(dtype).to(memory_format=weight)
        net[6].train()
        x, results = torch.randn(2, 3, 8, 8, dtype=dtype).to(memory_format=data), []
        for change in (fk.unfuse, fk.fuse):
            change(net)
            torch.manual_seed(1)
            results.append(net(x))
        assert any(row.fused for row in fusion_report(net))
        assert results[1].stride() == results[0].stride(), (weight, data)
        torch.testing.assert_close(results[1], results[0])


class Block(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, out, kernel, padding=kernel // 2), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)


class Plain(Block):
    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Bare(Block):
    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class InPlace(Block):
    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class Added(Block):
    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + r)


class AddedTo(Block):
    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return F.relu(r + self.norm(self.conv(x)))


class AddedInPlace(Block):
    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += r
        return self.relu(y)


class AddedSix(Block):
    """Torch's ReLU6 lays its gradient out as dy, ReLU as its result."""

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return F.relu6(self.norm(self.conv(x)) + r)


class Sum(Block):
    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return r + self.conv(x)


BLOCKS = (Plain, Bare, InPlace, Added, AddedTo, AddedInPlace, AddedSix, Sum)
# Channels, output channels, height, width, kernel: some that leave one block of memory NCHW and NHWC.
SIZES = [(3, 4, 5, 6, 3), (3, 1, 5, 6, 3), (1, 4, 5, 6, 1), (1, 1, 5, 6, 3), (3, 4, 1, 1, 1), (3, 4, 5, 1, 1)]


def laid_out(n: int, c: int, h: int, w: int, layout: str) -> Tensor:
    """Integers, which every order of sums keeps exact."""
    x = torch.randint(-2, 3, (n, c + 1, h, w)).float()
    if layout == "columns":  # NHWC with height and width swapped, as behind a transpose
        return x[:, 1:].transpose(2, 3).contiguous(memory_format=NHWC).transpose(2, 3)
    if "NHWC" in layout:
        x = x.contiguous(memory_format=NHWC)
    return x[:, 1:] if "slice" in layout else x[:, 1:].contiguous(memory_format=NHWC if layout == "NHWC" else NCHW)


def strides_and_values(model: nn.Module, x: Tensor, r: Tensor, dy: Tensor) -> list[object]:
    x, r = x.detach().requires_grad_(), r.detach().requires_grad_()
    y = model(x, r)
    gradients = torch.autograd.grad(y, (x, r), dy, allow_unused=True)
    assert y.requires_grad
    return [(y.stride(), *(g.stride() for g in gradients if g is not None)), [y, *gradients]]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_strides_of_results_and_gradients(kind: type[Block], size: tuple[int, ...]) -> None:
    c, k, h, w, kernel = size
    torch.manual_seed(0)
    stock = kind(c, k, kernel).eval().requires_grad_(False)
    layouts = ("NCHW", "NHWC", "columns", "slice", "NHWC slice")
    for of_weight, batch, of_x in product((NCHW, NHWC), (1, 2), layouts):
        model = copy.deepcopy(stock).to(memory_format=of_weight)
        fused = fk.fuse(copy.deepcopy(model))
        assert any(row.fused for row in fusion_report(fused))
        for of_r, of_dy in product(layouts if kind not in BLOCKS[:3] else layouts[:1], layouts[:2]):
            tensors = (laid_out(batch, c, h, w, of_x), laid_out(batch, k, h, w, of_r), laid_out(batch, k, h, w, of_dy))
            (ours, mine), (theirs, others) = (strides_and_values(m, *tensors) for m in (fused, model))
            assert ours == theirs, (of_weight, batch, of_x, of_r, of_dy)
            torch.testing.assert_close(mine, others, rtol=1e-4, atol=1e-4)


class Around(AddedSix):
    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        for _ in range(2):
            x = F.relu6(self.norm(self.conv(x)) + x)
        return x


@pytest.mark.parametrize("size", [(2, 4, 5, 6), (1, 4, 5, 6), (2, 1, 5, 6)], ids=str)
def test_a_sum_of_gradients_is_laid_out_as_what_came_first(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    stock = Around(size[1], size[1], 3).eval().requires_grad_(False)
    fused = fk.fuse(copy.deepcopy(stock))
    layouts = ("NCHW", "NHWC", "columns", "slice", "NHWC slice")
    for of_x, of_dy in product(layouts, layouts):
        tensors = (laid_out(*size, of_x), torch.zeros(1), laid_out(*size, of_dy))
        (ours, mine), (theirs, others) = (strides_and_values(m, *tensors) for m in (fused, stock))
        assert ours == theirs, (of_x, of_dy)
        torch.testing.assert_close(mine, others)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=str)
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_alike_layouts_run_as_one_operator(kind: type[Block], layout: torch.memory_format) -> None:
    fused = fk.fuse(kind(3, 4, 3).eval().requires_grad_(False).to(memory_format=layout))
    x, r = (torch.randn(2, c, 6, 6).to(memory_format=layout).requires_grad_() for c in (3, 4))
    assert fused(x, r).grad_fn.name() == "FreezekitFrozenConv2dBackward"


@pytest.mark.parametrize("kind", [Plain, InPlace, AddedTo], ids=lambda kind: kind.__name__)
def test_compiled_strides(kind: type[Block]) -> None:
    for (c, k, h, w, kernel), of_x, of_r in product((SIZES[0], SIZES[1], SIZES[4]), ("NCHW", "NHWC"), ("NCHW", "NHWC")):
        stock = kind(c, k, kernel).eval().requires_grad_(False)
        tensors = (laid_out(2, c, h, w, of_x), laid_out(2, k, h, w, of_r), laid_out(2, k, h, w, of_x))
        found = []
        for model in (stock, fk.fuse(copy.deepcopy(stock))):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            found.append(strides_and_values(compiled, *tensors)[0])
            torch.compiler.reset()
        assert found[0] == found[1]


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=str)
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_batched_gradients(kind: type[Block], layout: torch.memory_format) -> None:
    """Of is_grads_batched, whose tensors know no formats; one by one, they go another way."""
    stock = kind(4, 4, 3).eval().requires_grad_(False).to(memory_format=layout)
    fused = fk.fuse(copy.deepcopy(stock))
    x, r = (torch.randn(2, 4, 6, 6).to(memory_format=layout).requires_grad_() for _ in range(2))
    cotangents = torch.randn(3, 2, 4, 6, 6)
    ys = [model(model(x, r).clone(), r) for model in (fused, stock)]
    for leaves in ([x], [x, r]):
        ours, theirs = (
            torch.autograd.grad(y, leaves, cotangents, is_grads_batched=True, retain_graph=True, allow_unused=True)
            for y in ys
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
