"""The whole product of what a convolution may be: part of `make emulate-all`.

Every operator, family and dtype, on stride 1 to 3, dilation 1 and 2, filters of 1x1 to 7x7, whole and ragged channels,
N = 0 to 3, and outputs of one row or column; the parts of the epilogue go round, so that every combination meets every
geometry's neighbours. Small integers, outputs poisoned before, so equality is exact.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from .emulated import OPERATORS, Problem, Settings, run_conv2d
from .reference import conv2d, operands
from .test_epilogue import PARTS, check

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FAMILIES = [
    *(("direct", dtype) for dtype in FLOATS),
    *(("implicit_gemm", dtype) for dtype in FLOATS if dtype != torch.float64),
    *(("depthwise", dtype) for dtype in FLOATS),
]
COMBINATIONS = [set(parts) for count in range(len(PARTS) + 1) for parts in itertools.combinations(PARTS, count)]


def problems(depthwise: bool) -> list[Problem]:
    """One for each point of the product; sizes are the least that have two rows or columns of output, or one."""
    found = []
    axes = ((1, 2, 3), (1, 2), (1, 2, 3, 5, 7), (False, True), range(4), (1, 2))
    for stride, dilation, size, ragged, n, rows in itertools.product(*axes):
        c, k = (5, 11) if ragged else (8, 16)
        extent = dilation * (size - 1) + 1
        pad = (extent // 2, extent // 3)
        h = extent + stride * (rows - 1) + (stride - 1) - 2 * pad[0]
        w = extent + stride * (2 - rows) * 3 + 1 - 2 * pad[1]
        k, groups = (c * (1 + ragged), c) if depthwise else (k, 1)
        found.append(
            Problem(n=n, c=c, k=k, h=max(1, h), w=max(1, w), r=size, s=size, pad=pad, stride=(stride, stride),
                    dilation=(dilation, dilation), groups=groups)
        )  # fmt: skip
    return found


def test_the_product_has_what_it_names() -> None:
    for depthwise in (False, True):
        made = problems(depthwise)
        assert len(made) == 3 * 2 * 5 * 2 * 4 * 2
        assert {p.n for p in made} == {0, 1, 2, 3}
        assert sum(p.p == 1 or p.q == 1 for p in made) > len(made) // 3
        assert min(min(p.p, p.q) for p in made) == 1
        assert max(max(p.p, p.q) for p in made) > 1


@pytest.mark.full
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("family", "dtype"), FAMILIES, ids=str)
def test_every_point(family: str, dtype: torch.dtype, operator: str) -> None:
    settings = Settings(family=family, allow_tf32=True)
    for index, problem in enumerate(problems(family == "depthwise")):
        if operator == "wgrad":
            first, second = operands(operator, problem, dtype, integers=True)
            actual, kernel = run_conv2d(operator, problem, first, second, settings=settings)
            assert torch.equal(actual, conv2d(operator, problem, first, second).to(dtype)), (kernel, problem)
        else:
            check(operator, problem, dtype, COMBINATIONS[index % len(COMBINATIONS)], settings)
