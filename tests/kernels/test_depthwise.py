"""The depthwise family against float64, and the bytes its tiled kernels move."""

from __future__ import annotations

import pytest
import torch

from .emulated import OPERATORS, Problem, Settings, counters, run_conv2d
from .reference import assert_close, conv2d, operands, reduction_length

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DEPTHWISE = Settings(family="depthwise", sm=80)


def depthwise(
    size: int, stride: int, h: int = 19, w: int = 21, c: int = 40, pad: int | None = None, n: int = 2
) -> Problem:
    """A problem with a tiled kernel: more than one tile along each axis, none of them full."""
    pads = (size // 2 if pad is None else pad,) * 2
    return Problem(n=n, c=c, k=c, h=h, w=w, r=size, s=size, pad=pads, stride=(stride, stride), groups=c)


TILED = [depthwise(size, stride) for size in (3, 5, 7) for stride in (1, 2)]
# Paddings of either parity, none, and more than the filter's reach; tensors smaller than a tile; single rows.
EDGES = [
    depthwise(3, 2, pad=0, c=8),
    depthwise(3, 1, pad=4, c=8, h=3, w=3),
    depthwise(5, 2, pad=1, c=8, h=8, w=40),
    depthwise(7, 2, pad=2, c=8, h=34, w=7),
    depthwise(3, 1, pad=0, c=16, h=3, w=40, n=3),
    depthwise(3, 2, c=8, h=1, w=1),
    depthwise(3, 1, n=0),
]
GENERIC = [
    Problem(n=2, c=6, k=6, h=7, w=6, groups=6),
    Problem(n=1, c=5, k=15, h=8, w=7, stride=(2, 1), groups=5),
    Problem(n=1, c=8, k=16, h=9, w=9, r=5, s=3, pad=(2, 2), dilation=(2, 1), groups=8),
    Problem(n=2, c=16, k=16, h=9, w=8, pad=(2, 2), dilation=(2, 2), stride=(2, 2), groups=16),
    Problem(n=1, c=16, k=16, h=6, w=6, r=1, s=1, pad=(0, 0), stride=(3, 2), groups=16),
    Problem(n=1, c=40, k=40, h=5, w=5, r=2, s=2, pad=(1, 1), stride=(3, 3), groups=40),
    Problem(n=0, c=4, k=8, groups=4),
]


def check(operator: str, problem: Problem, dtype: torch.dtype, kind: str, settings: Settings, offset: int = 0) -> None:
    first, second = operands(operator, problem, dtype, integers=True)
    actual, kernel = run_conv2d(operator, problem, first, second, settings=settings, offset=offset)
    assert torch.equal(actual, conv2d(operator, problem, first, second).to(dtype)), (problem, kernel)
    assert kernel == f"depthwise_{operator}_{kind}"


@pytest.mark.parametrize("problem", [*TILED, *EDGES], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_tiled(operator: str, problem: Problem) -> None:
    for dtype in DTYPES:
        check(operator, problem, dtype, "tiled", DEPTHWISE)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_generic(operator: str, dtype: torch.dtype) -> None:
    for problem in GENERIC:
        check(operator, problem, dtype, "generic", DEPTHWISE)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_address_off_16_bytes_goes_the_generic_way(operator: str) -> None:
    check(operator, TILED[0], torch.bfloat16, "tiled", DEPTHWISE, offset=3)


@pytest.mark.parametrize("split_k", [1, 2, 5])
@pytest.mark.parametrize("problem", [TILED[1], GENERIC[1]], ids=str)
def test_wgrad_however_it_is_cut(problem: Problem, split_k: int) -> None:
    settings = Settings(family="depthwise", sm=80, split_k=split_k)
    check("wgrad", problem, torch.float32, "tiled" if problem.c % 8 == 0 else "generic", settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_normals_are_close(operator: str, dtype: torch.dtype) -> None:
    for problem in (TILED[0], TILED[5], GENERIC[1]):
        first, second = operands(operator, problem, dtype, integers=False)
        actual, _ = run_conv2d(operator, problem, first, second, settings=DEPTHWISE)
        expected = conv2d(operator, problem, first, second)
        assert_close(actual, expected, reduction_length(operator, problem), dtype)


def test_wgrad_gives_the_same_bits_under_every_schedule() -> None:
    first, second = operands("wgrad", TILED[3], torch.float16, integers=False)
    settings = [Settings(family="depthwise", sm=80, seed=seed, split_k=3) for seed in range(3)]
    results = [run_conv2d("wgrad", TILED[3], first, second, settings=s)[0] for s in settings]
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_wgrad_of_an_infinite_input_where_no_output_looks() -> None:
    """A column of x that no window reaches must not turn dw into NaN."""
    problem = Problem(n=1, c=8, k=8, h=6, w=6, r=3, s=3, pad=(0, 0), stride=(2, 2), groups=8)
    first, second = operands("wgrad", problem, torch.float32, integers=True)
    expected = conv2d("wgrad", problem, first, second).float()
    second[..., 5] = float("inf")
    actual, kernel = run_conv2d("wgrad", problem, first, second, settings=DEPTHWISE)
    assert torch.equal(actual, expected), kernel


@pytest.mark.parametrize(("size", "limit"), [(3, 1.3), (5, 1.45), (7, 1.6)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("operator", OPERATORS)
def test_bytes_moved(operator: str, stride: int, size: int, limit: float) -> None:
    """All tensors together against each of them once, by the emulator's counters."""
    problem = depthwise(size, stride, h=64, w=64, c=32, n=1)
    first, second = operands(operator, problem, torch.bfloat16, integers=True)
    with counters() as counted:
        run_conv2d(operator, problem, first, second, settings=Settings(family="depthwise", sm=80, split_k=1))
    sizes = problem.sizes.values()
    ideal = 2 * sum(a * b * c * d for a, b, c, d in sizes)
    moved = counted["global_read_bytes"] + counted["global_write_bytes"]
    assert moved >= 0.9 * ideal, "the counters miss accesses"
    assert moved <= limit * ideal, f"{moved / ideal:.2f} times the least traffic"
