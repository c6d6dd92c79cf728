"""A frozen block of few positions, which on a CPU reads its filter as it is: in chunks, and a few rows at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import freezekit  # noqa: F401  (its operators)

# Size of x, filters, kernel: lengths around a chunk of 512, rows and channels that are no multiples of a tile.
CASES = [
    ((1, 511, 1, 1), 7, 1),
    ((3, 512, 1, 1), 8, 1),
    ((1, 513, 2, 2), 9, 1),
    ((1, 115, 2, 2), 4, 3),
    ((2, 1027, 1, 3), 260, 1),
    ((1, 130, 4, 4), 230, 3),
    ((1, 257, 3, 5), 1030, 1),
]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_are_exact(case: tuple, layout: torch.memory_format) -> None:
    size, filters, kernel = case
    torch.manual_seed(0)
    x = torch.randint(-4, 5, size).float().contiguous(memory_format=layout).requires_grad_()
    w = torch.randint(-4, 5, (filters, size[1], kernel, kernel)).float().contiguous(memory_format=layout)
    padding = [kernel // 2, kernel // 2]
    y, _ = torch.ops.freezekit.frozen_conv2d(x, w, None, None, "relu", [1, 1], padding)
    exact = F.conv2d(x.double(), w.double(), padding=padding).relu()
    assert torch.equal(y.double(), exact)
    dy = torch.randint_like(y, -4, 5)
    (dx,), (expected,) = (torch.autograd.grad(a, x, dy.to(a.dtype)) for a in (y, exact))
    assert torch.equal(dx, expected)
