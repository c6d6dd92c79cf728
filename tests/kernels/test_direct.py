"""The direct family against float64: every geometry and dtype."""

from __future__ import annotations

import pytest
import torch

from .cases import GEOMETRIES
from .emulated import OPERATORS, KernelError, Problem, Settings, run_conv2d
from .reference import assert_close, conv2d, operands, reduction_length

# Below sm_80 no problem goes to tensor cores.
DIRECT = Settings(family="direct", sm=75)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_integers_are_exact(operator: str, dtype: torch.dtype) -> None:
    for problem in GEOMETRIES:
        first, second = operands(operator, problem, dtype, integers=True)
        actual, _ = run_conv2d(operator, problem, first, second, settings=DIRECT)
        assert torch.equal(actual, conv2d(operator, problem, first, second).to(dtype)), problem


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_normals_are_close(operator: str, dtype: torch.dtype) -> None:
    for problem in GEOMETRIES[1::3]:
        first, second = operands(operator, problem, dtype, integers=False)
        actual, _ = run_conv2d(operator, problem, first, second, settings=DIRECT)
        expected = conv2d(operator, problem, first, second)
        assert_close(actual, expected, reduction_length(operator, problem), dtype)


@pytest.mark.parametrize("config", [0, 1])
@pytest.mark.parametrize("operator", OPERATORS)
def test_both_tiles_take_every_size(operator: str, config: int) -> None:
    for problem in (GEOMETRIES[3], GEOMETRIES[-1], GEOMETRIES[-4]):
        first, second = operands(operator, problem, torch.float32, integers=True)
        settings = Settings(family="direct", config=config)
        actual, _ = run_conv2d(operator, problem, first, second, settings=settings)
        assert torch.equal(actual, conv2d(operator, problem, first, second).float()), problem


@pytest.mark.parametrize("split_k", [1, 2, 3, 7, 64])
def test_wgrad_is_the_same_sum_however_it_is_cut(split_k: int) -> None:
    problem = Problem(n=2, c=5, k=6, h=7, w=5)
    first, second = operands("wgrad", problem, torch.float32, integers=True)
    actual, _ = run_conv2d("wgrad", problem, first, second, settings=Settings(family="direct", split_k=split_k))
    assert torch.equal(actual, conv2d("wgrad", problem, first, second).float())


@pytest.mark.parametrize("operator", OPERATORS)
def test_any_element_address_will_do(operator: str) -> None:
    problem = Problem(n=1, c=8, k=16)
    first, second = operands(operator, problem, torch.bfloat16, integers=True)
    actual, _ = run_conv2d(operator, problem, first, second, settings=DIRECT, offset=1)
    assert torch.equal(actual, conv2d(operator, problem, first, second).bfloat16())


@pytest.mark.parametrize(
    "settings",
    [Settings(family="direct", config=2), Settings(family="direct", split_k=70000)],
    ids=["config", "split_k"],
)
def test_a_selection_out_of_range_is_refused(settings: Settings) -> None:
    problem = Problem(n=1, c=2, k=2, h=3, w=3)
    with pytest.raises(KernelError, match="invalid_argument"):
        run_conv2d("wgrad", problem, *operands("wgrad", problem, torch.float32, integers=True), settings=settings)
