"""A frozen block of few positions, which on a CPU reads its filter as it is: in chunks, and a few rows at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import freezekit  # noqa: F401  (its operators)

USES = torch.backends.cpu.get_cpu_capability()
LAYOUTS = [torch.channels_last, torch.contiguous_format]
# Size of x, filters, kernel, stride: lengths around a chunk, rows, channels and inputs that are no multiples of a tile.
FEW = [
    ((1, 511, 1, 1), 7, 1, 1),
    ((3, 512, 1, 1), 8, 1, 1),
    ((1, 513, 2, 2), 9, 1, 1),
    ((1, 1153, 2, 2), 9, 1, 1),
    ((1, 115, 2, 2), 4, 3, 1),
    ((2, 1027, 1, 3), 260, 1, 1),
    ((1, 130, 4, 4), 230, 3, 1),
    ((1, 257, 3, 5), 1030, 1, 1),
]
# With AVX-512 alone; and in channels_last, of 1 x 1, where threads take some of them each.
MORE = [((2, 67, 8, 9), 134, 3, 2), ((1, 61, 8, 8), 67, 3, 1)]
MANY = [((2, 48, 9, 10), 35, 3, 1), ((1, 150, 27, 28), 70, 3, 2), ((3, 131, 29, 31), 40, 1, 1)]
SMALL = [((1, 7, 3, 3), 5, 3, 1)]  # torch's, forward or both ways

# Both passes are freezekit's, whose bits are promised. Those of torch's kernels depend on threads with AVX2.
with_avx512 = pytest.mark.skipif(USES != "AVX512", reason="with fewer lanes 16 positions are the most")
OURS = [
    *(pytest.param(case, layout, id=f"{case}-{layout}") for case in FEW for layout in LAYOUTS),
    *(pytest.param(case, layout, id=f"{case}-{layout}", marks=with_avx512) for case in MORE for layout in LAYOUTS),
    *(pytest.param(case, LAYOUTS[0], id=f"{case}-{LAYOUTS[0]}", marks=with_avx512) for case in MANY),
]


def operands(case: tuple, layout: torch.memory_format, integers: bool) -> tuple[Tensor, Tensor, list, list]:
    size, filters, kernel, stride = case
    torch.manual_seed(0)
    make = (lambda *s: torch.randint(-4, 5, s).float()) if integers else torch.randn
    x, w = make(*size), make(filters, size[1], kernel, kernel)
    x, w = (t.contiguous(memory_format=layout) for t in (x, w))
    return x.requires_grad_(), w, [stride, stride], [kernel // 2, kernel // 2]


def results(case: tuple, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Of random numbers: equal to the bit only if they are made in the same way."""
    x, w, stride, padding = operands(case, layout, integers=False)
    y, _ = torch.ops.freezekit.frozen_conv2d(x, w, None, None, "relu", stride, padding)
    return y, torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", FEW + MORE + MANY + SMALL, ids=str)
def test_integers_are_exact(case: tuple, layout: torch.memory_format) -> None:
    x, w, stride, padding = operands(case, layout, integers=True)
    y, _ = torch.ops.freezekit.frozen_conv2d(x, w, None, None, "relu", stride, padding)
    exact = F.conv2d(x.double(), w.double(), None, stride, padding).relu()
    assert torch.equal(y.double(), exact)
    dy = torch.randint_like(y, -4, 5)
    (dx,), (expected,) = (torch.autograd.grad(a, x, dy.to(a.dtype)) for a in (y, exact))
    assert torch.equal(dx, expected)


@pytest.mark.parametrize(("case", "layout"), OURS)
def test_bits_do_not_depend_on_threads(case: tuple, layout: torch.memory_format) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(case, layout))
    finally:
        torch.set_num_threads(before)
    for y, dx in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(dx, found[0][1])


@with_avx512
@pytest.mark.parametrize("case", [((1, 61, 8, 8), 67, 3, 1), *MANY], ids=str)
def test_more_positions_are_taken_with_avx512(case: tuple) -> None:
    x, w, stride, padding = operands(case, torch.channels_last, integers=False)
    stock = F.conv2d(x, w, None, stride, padding).relu()
    y, dx = results(case, torch.channels_last)
    assert not torch.equal(y, stock)
    if case[2] > 1:  # of 1 x 1 there is one order
        assert not torch.equal(dx, torch.autograd.grad(stock.sum(), x)[0])
