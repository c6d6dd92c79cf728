"""db, the sum of dy over its rows."""

from __future__ import annotations

import pytest
import torch

from .emulated import run_bias_grad
from .reference import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "k"), [(0, 3), (1, 1), (7, 5), (128, 32), (129, 33), (1000, 70), (4500, 35)])
def test_bias_grad(rows: int, k: int, dtype: torch.dtype) -> None:
    integers = torch.randint(-1, 2, (rows, k)).to(dtype)
    assert torch.equal(run_bias_grad(integers), integers.double().sum(0).to(dtype))
    normals = torch.randn(rows, k, dtype=torch.float64).to(dtype)
    assert_close(run_bias_grad(normals), normals.double().sum(0), rows, dtype)


def test_bias_grad_of_more_rows_than_slices_hold() -> None:
    """The number of slices has a limit, beyond which slices grow."""
    dy = torch.randint(-1, 2, (66000, 2)).float()
    assert torch.equal(run_bias_grad(dy), dy.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1000, 4500])
def test_bias_grad_gives_the_same_bits_under_every_schedule(rows: int, dtype: torch.dtype) -> None:
    dy = torch.randn(rows, 40).to(dtype)
    results = [run_bias_grad(dy, seed) for seed in range(5)]
    assert all(torch.equal(results[0], result) for result in results[1:])
