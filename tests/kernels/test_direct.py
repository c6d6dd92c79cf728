"""The direct family against float64: every geometry, dtype and epilogue."""

from __future__ import annotations

import pytest
import torch

from .cases import GEOMETRIES
from .emulated import OPERATORS, Problem, Settings, run_bias_grad, run_conv2d
from .reference import assert_close, conv2d, operands, reduction_length

DIRECT = Settings(family="direct")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_integers_are_exact(operator: str, dtype: torch.dtype) -> None:
    for problem in GEOMETRIES:
        first, second = operands(operator, problem, dtype, integers=True)
        actual, _ = run_conv2d(operator, problem, first, second, settings=DIRECT)
        expected = conv2d(operator, problem, first, second).to(dtype)
        assert torch.equal(actual, expected), problem
