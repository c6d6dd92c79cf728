"""The tensor-core family against float64: every geometry, tile, access and dtype."""

from __future__ import annotations

import pytest
import torch

from .cases import GEOMETRIES
from .emulated import OPERATORS, Problem, Settings, counters, run_conv2d
from .reference import assert_close, conv2d, operands, reduction_length

GEMM = Settings(family="implicit_gemm", allow_tf32=True)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Several tiles along every GEMM index, none of them full, and more k-tiles than the ring has stages.
TILED = [
    Problem(n=2, c=40, k=136, h=9, w=9),
    Problem(n=2, c=136, k=40, h=10, w=9, stride=(2, 2)),
    Problem(n=1, c=168, k=72, h=13, w=13, r=1, s=1, pad=(0, 0)),
    Problem(n=1, c=32, k=144, h=7, w=7, groups=2, dilation=(2, 1), pad=(2, 1)),
]


def check(operator: str, problem: Problem, dtype: torch.dtype, settings: Settings, offset: int = 0) -> None:
    first, second = operands(operator, problem, dtype, integers=True)
    with counters() as counted:
        actual, _ = run_conv2d(operator, problem, first, second, settings=settings, offset=offset)
    expected = conv2d(operator, problem, first, second).to(dtype)
    assert torch.equal(actual, expected), (problem, settings)
    assert not expected.any() or counted["mma"] > 0, "no tensor-core instruction ran"
    assert counted["ldmatrix_conflicts"] == 0, "rows of an ldmatrix share banks"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_integers_are_exact(operator: str, dtype: torch.dtype) -> None:
    for problem in GEOMETRIES:
        check(operator, problem, dtype, GEMM)


@pytest.mark.parametrize("config", range(5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ["fprop", "dgrad"])
def test_every_tile(operator: str, dtype: torch.dtype, config: int) -> None:
    for problem in TILED[config % 2 :: 2]:
        check(operator, problem, dtype, Settings(family="implicit_gemm", config=config))


@pytest.mark.parametrize("config", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_of_wgrad(dtype: torch.dtype, config: int) -> None:
    for problem, split_k in zip(TILED, (1, 3, 2, 5)):
        check("wgrad", problem, dtype, Settings(family="implicit_gemm", config=config, split_k=split_k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c", "k"), [(3, 16), (16, 5), (3, 5)])
def test_wgrad_of_ragged_channels(dtype: torch.dtype, c: int, k: int) -> None:
    """Either operand, or both, element by element; dw has rows of an odd number of elements."""
    check("wgrad", Problem(n=2, c=c, k=k, h=9, w=8, stride=(2, 1)), dtype, GEMM)


def test_wgrad_gives_the_same_bits_under_every_schedule() -> None:
    problem = TILED[1]
    first, second = operands("wgrad", problem, torch.bfloat16, integers=False)
    settings = [Settings(family="implicit_gemm", split_k=4, seed=seed) for seed in (0, 1, 2, 3)]
    results = [run_conv2d("wgrad", problem, first, second, settings=s)[0] for s in settings]
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.full
@pytest.mark.parametrize("config", range(5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ["fprop", "dgrad"])
def test_every_tile_on_every_problem(operator: str, dtype: torch.dtype, config: int) -> None:
    for problem in [*TILED, *GEOMETRIES]:
        check(operator, problem, dtype, Settings(family="implicit_gemm", config=config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_address_off_16_bytes_goes_element_by_element(operator: str, dtype: torch.dtype) -> None:
    check(operator, Problem(n=1, c=16, k=24), dtype, Settings(family="implicit_gemm", config=0), offset=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_normals_are_close(operator: str, dtype: torch.dtype) -> None:
    for problem in (*TILED[:2], GEOMETRIES[8]):
        first, second = operands(operator, problem, dtype, integers=False)
        actual, _ = run_conv2d(operator, problem, first, second, settings=GEMM)
        if dtype == torch.float32:  # what is left of an fp32 value after rounding to tf32's 10 bits of mantissa
            first, second = tf32(first), tf32(second)
        expected = conv2d(operator, problem, first, second)
        assert_close(actual, expected, reduction_length(operator, problem), dtype)


def tf32(value: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest, ties away from zero."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("cp_async", ["eager", "mixed"])
def test_the_order_of_threads_and_copies_does_not_matter(seed: int, cp_async: str) -> None:
    for operator in OPERATORS:
        for dtype in (torch.bfloat16, torch.float32):
            check(operator, TILED[1], dtype, Settings(family="implicit_gemm", config=2, seed=seed, cp_async=cp_async))
