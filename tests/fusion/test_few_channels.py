"""dgrad of a frozen block whose input has few channels, as images have: on a CPU it has a kernel of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import freezekit  # noqa: F401  (its operators)

LAYOUTS = [torch.channels_last, torch.contiguous_format]
# Size of x, filters, kernel, settings: first layers, windows that hang over every side, bands of rows that meet.
CASES: list[tuple[tuple[int, int, int, int], int, tuple[int, int], dict]] = [
    ((2, 3, 23, 21), 7, (7, 7), {"stride": (2, 2), "padding": (3, 3)}),
    ((1, 3, 24, 9), 13, (3, 3), {"padding": (1, 1)}),
    ((3, 3, 17, 18), 8, (4, 4), {"stride": (4, 4)}),
    ((1, 3, 18, 37), 6, (5, 16), {"stride": (3, 2), "padding": (2, 9)}),
    ((1, 2, 40, 13), 12, (11, 5), {"padding": (5, 2)}),
    ((2, 1, 19, 60), 7, (3, 50), {"padding": (4, 30)}),
    ((1, 3, 30, 12), 15, (5, 3), {"padding": (4, 1), "dilation": (3, 1)}),
    ((1, 3, 16, 16), 5, (3, 3), {"padding": (2, 2), "dilation": (2, 2)}),
    ((1, 3, 11, 11), 9, (3, 3), {"stride": (4, 4), "padding": (2, 2)}),
]


def stock(dy: Tensor, w: Tensor, size: torch.Size, settings: dict) -> Tensor:
    x = torch.zeros(size, dtype=dy.dtype, requires_grad=True)
    return torch.autograd.grad(F.conv2d(x, w, **settings), x, dy)[0]


def ours(dy: Tensor, w: Tensor, size: torch.Size, settings: dict, **more: object) -> Tensor:
    last = not dy.is_contiguous() or not w.is_contiguous()
    return torch.ops.freezekit.frozen_conv2d_dgrad(dy, w, size, channels_last=last, **settings, **more)


def operands(case: tuple, layout: torch.memory_format) -> tuple[Tensor, Tensor, torch.Size, dict]:
    """Whole numbers, so that sums are exact."""
    size, filters, kernel, settings = case
    torch.manual_seed(0)
    w = torch.randint(-4, 5, (filters, size[1], *kernel)).float()
    y = F.conv2d(torch.zeros(size), w, **settings)
    dy = torch.randint_like(y, -4, 5)
    return dy.contiguous(memory_format=layout), w.contiguous(memory_format=layout), torch.Size(size), settings


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_are_exact(case: tuple, layout: torch.memory_format) -> None:
    dy, w, size, settings = operands(case, layout)
    dx = ours(dy, w, size, settings)
    assert dx.is_contiguous(memory_format=layout)
    assert torch.equal(dx.double(), stock(dy.double(), w.double(), size, settings))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_with_all_that_a_block_adds(layout: torch.memory_format) -> None:
    dy, w, size, settings = operands(CASES[0], layout)
    var, gamma = torch.tensor([0.25, 1, 4, 0.25, 1, 4, 1]), torch.tensor([1.0, 2, -1, 3, 1, -2, 4])
    residual = torch.randint(-4, 5, size).float().contiguous(memory_format=layout)
    scaled = dy.double() * (gamma / var.sqrt()).double().view(1, -1, 1, 1)
    expected = stock(scaled, w.double(), size, settings) + residual
    dx = ours(dy, w, size, settings, residual=residual, norm_weight=gamma, running_var=var)
    assert torch.equal(dx.double(), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case[3].get("dilation") != (2, 2)], ids=str)
def test_the_number_of_threads_changes_no_bit(case: tuple) -> None:
    dy, w, size, settings = operands(case, torch.channels_last)
    dy, w = torch.randn_like(dy), torch.randn_like(w)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ours(dy, w, size, settings))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_not_finite_stays_in_its_window(case: tuple, value: float) -> None:
    dy, w, size, settings = operands(case, torch.channels_last)
    w = w.abs() + 1
    dy.zero_()
    for at in ((0, 1, 0, 0), (0, 0, 1, 1), (-1, 2, -1, -1)):
        dy[at] = value
    reached = stock(torch.isfinite(dy).logical_not().double(), torch.ones_like(w).double(), size, settings) > 0
    dx = ours(dy, w, size, settings)
    assert torch.equal(torch.isfinite(dx), reached.logical_not())
    assert torch.equal(dx[reached.logical_not()], torch.zeros_like(dx)[reached.logical_not()])


@pytest.mark.parametrize(("channels", "filters"), [(3, 1), (3, 2), (3, 11), (2, 4)])
def test_few_filters_in_nhwc_are_left_to_torch(channels: int, filters: int) -> None:
    """What the kernel takes hardly depends on their number: of 2, it takes 2.7 of oneDNN's time."""
    torch.manual_seed(0)
    size, settings = torch.Size((2, channels, 40, 41)), {"padding": (2, 2)}
    w = torch.randn(filters, channels, 5, 5).contiguous(memory_format=torch.channels_last)
    dy = torch.randn(2, filters, 40, 41).contiguous(memory_format=torch.channels_last)
    x = torch.zeros(size).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = torch.autograd.grad(F.conv2d(x, w, **settings), x, dy)[0]
    assert torch.equal(torch.ops.freezekit.frozen_conv2d_dgrad(dy, w, size, channels_last=True, **settings), expected)
