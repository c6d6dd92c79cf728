"""The Hopper family, emulated, against float64: bulk copies, mbarriers and wgmma on all that tensor maps can hold."""

from __future__ import annotations

import itertools

import pytest
import torch

from .emulated import OPERATORS, Epilogue, KernelError, Problem, Settings, counters, run_conv2d, select
from .reference import assert_close, conv2d, finish, operands, pack_mask, reduction_length
from .test_epilogue import PARTS, integers

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GATHERS = ("fprop", "dgrad")
# Channels that are whole k-tiles, ragged ones, and fewer than a k-tile has; strides 1 to 3 and beyond the filter, so
# that phases of dgrad have no taps; dilations; filters of 1x1 to 7x7; padding beyond the filter; several row tiles.
GEOMETRIES = [
    Problem(n=1, c=64, k=64, h=6, w=5, r=1, s=1, pad=(0, 0)),
    Problem(n=2, c=64, k=72, h=6, w=7),
    Problem(n=2, c=72, k=40, h=9, w=8, stride=(2, 2)),
    Problem(n=3, c=16, k=40, r=1, s=1, pad=(0, 0), stride=(2, 2)),
    Problem(n=1, c=8, k=136, h=9, w=9, dilation=(2, 1), pad=(2, 1)),
    Problem(n=1, c=16, k=24, h=15, w=14, r=7, s=7, pad=(3, 3), stride=(2, 2)),
    Problem(n=2, c=24, k=16, h=11, w=10, stride=(3, 3)),
    Problem(n=2, c=24, k=16, h=3, w=2, r=1, s=1, pad=(2, 2), stride=(4, 5)),
    Problem(n=1, c=32, k=8, h=13, w=12, r=5, s=2, pad=(2, 0), dilation=(2, 2), stride=(2, 1)),
    Problem(n=2, c=128, k=128, h=5, w=4, groups=2, pad=(1, 0)),
    Problem(n=0, c=8, k=8),
]
# Of wgrad: rows and panels with tails, several of each, groups that begin inside a panel, slices that are empty.
WGRADS = [
    *GEOMETRIES[:9],
    Problem(n=2, c=48, k=80, h=6, w=5, groups=2),
    Problem(n=3, c=136, k=144, h=9, w=7, r=2),
    Problem(n=1, c=8, k=8, h=3, w=3),
    Problem(n=0, c=8, k=8),
]
# Ragged outputs, which go element by element, and those that own bytes of the mask.
EPILOGUES = [Problem(n=1, c=16, k=40, h=5, w=5, stride=(2, 1)), Problem(n=2, c=40, k=37, h=4, w=5)]


def hopper(config: int = 2, **settings: object) -> Settings:
    return Settings(family="hopper", config=config, **settings)  # type: ignore[arg-type]


def takes(operator: str, problem: Problem) -> bool:
    """Whether the channels that the operator reads are whole 16-byte chunks."""
    return (problem.c if operator == "fprop" else problem.k) % 8 == 0


def check(operator: str, problem: Problem, dtype: torch.dtype, settings: Settings) -> None:
    first, second = operands(operator, problem, dtype, integers=True)
    with counters() as counted:
        actual, _ = run_conv2d(operator, problem, first, second, settings=settings)
    expected = conv2d(operator, problem, first, second).to(dtype)
    assert torch.equal(actual, expected), (operator, problem, settings)
    if problem.n == 0:
        return  # nothing to multiply: a wgrad of zeros is left to sm_80
    assert not expected.any() or counted["wgmma"] > 0, "no wgmma ran"
    assert counted["mma"] == counted["cp_async"] == 0, "the family of sm_80 ran instead"


@pytest.mark.parametrize("config", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", GATHERS)
def test_integers_are_exact(operator: str, dtype: torch.dtype, config: int) -> None:
    for index, problem in enumerate(GEOMETRIES):
        if dtype != torch.bfloat16 and index % 3 != config:
            continue  # every problem once; bf16 takes all tiles
        check(operator, problem, dtype, hopper(config))


@pytest.mark.parametrize("config", range(3))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_integers_are_exact_in_wgrad(dtype: torch.dtype, config: int) -> None:
    for index, problem in enumerate(WGRADS):
        if dtype == torch.bfloat16 or index % 3 == config:
            check("wgrad", problem, dtype, hopper(config, split_k=1 + (index + config) % 3 * 2))


def test_wgrad_gives_the_same_bits_under_every_schedule() -> None:
    problem = WGRADS[10]
    first, second = operands("wgrad", problem, torch.bfloat16, integers=False)
    settings = [hopper(2, split_k=3, seed=seed) for seed in (0, 1, 2)]
    results = [run_conv2d("wgrad", problem, first, second, settings=s)[0] for s in settings]
    assert all(torch.equal(results[0], result) for result in results[1:])
    assert_close(results[0], conv2d("wgrad", problem, first, second), problem.n * problem.p * problem.q, torch.bfloat16)


@pytest.mark.parametrize("operator", GATHERS)
def test_several_tiles_along_every_index_of_the_gemm(operator: str) -> None:
    """More tiles than blocks, whose copies run ahead into the next tile, and more k-tiles than the ring has stages."""
    problem = Problem(n=4, c=136, k=168, h=15, w=13)
    check(operator, problem, torch.bfloat16, hopper(2))
    check(operator, problem, torch.bfloat16, hopper(1))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("cp_async", ["eager", "mixed"])
def test_the_order_of_threads_and_copies_does_not_matter(seed: int, cp_async: str) -> None:
    for operator in OPERATORS:
        check(operator, GEOMETRIES[2], torch.bfloat16, hopper(2, seed=seed, cp_async=cp_async))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", GATHERS)
def test_every_epilogue(operator: str, dtype: torch.dtype) -> None:
    for problem in EPILOGUES:
        if not takes(operator, problem):
            continue
        first, second = operands(operator, problem, dtype, integers=True)
        size = problem.sizes["y" if operator == "fprop" else "x"]
        words = (size[0] * size[1] * size[2] * size[3] + 31) // 32
        for count in range(len(PARTS) + 1):
            for parts in itertools.combinations(PARTS, count):
                keep_in = integers(size, torch.float32, 3) > 0 if "mask_in" in parts else None
                epilogue = Epilogue(
                    bias=integers((size[1],), dtype, 1) if "bias" in parts else None,
                    residual=integers(size, dtype, 2) if "residual" in parts else None,
                    relu="relu" in parts,
                    mask_out=torch.full((words,), -1, dtype=torch.int32) if "relu" in parts else None,
                    mask_in=None if keep_in is None else pack_mask(keep_in),
                )
                actual, _ = run_conv2d(operator, problem, first, second, epilogue, hopper())
                expected, keep = finish(conv2d(operator, problem, first, second), epilogue, keep_in, dtype)
                assert torch.equal(actual, expected.to(dtype)), (problem, parts)
                if epilogue.mask_out is not None:
                    assert torch.equal(epilogue.mask_out, pack_mask(keep)), (problem, parts)


def to_tf32(value: torch.Tensor) -> torch.Tensor:
    """Rounded as a bulk copy of tf32 does: to nearest, ties to even."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", GATHERS)
def test_normals_are_close(operator: str, dtype: torch.dtype) -> None:
    for problem in (GEOMETRIES[2], GEOMETRIES[4]):
        first, second = operands(operator, problem, dtype, integers=False)
        actual, _ = run_conv2d(operator, problem, first, second, settings=hopper(1))
        if dtype == torch.float32:
            first, second = to_tf32(first), to_tf32(second)
        expected = conv2d(operator, problem, first, second)
        assert_close(actual, expected, reduction_length(operator, problem), dtype)


@pytest.mark.parametrize("operator", GATHERS)
def test_a_group_is_not_touched_by_what_is_not_finite_in_the_next(operator: str) -> None:
    problem = Problem(n=1, c=128, k=128, h=4, w=4, groups=2)
    first, second = operands(operator, problem, torch.bfloat16, integers=True)
    first[:, 64:] = float("nan")
    actual, _ = run_conv2d(operator, problem, first, second, settings=hopper())
    expected = conv2d(operator, problem, first, second).to(torch.bfloat16)
    assert torch.equal(actual[:, :64], expected[:, :64])


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_address_off_16_bytes_goes_to_the_family_of_sm_80(operator: str) -> None:
    problem = Problem(n=1, c=16, k=24)
    first, second = operands(operator, problem, torch.bfloat16, integers=True)
    with counters() as counted:
        actual, _ = run_conv2d(operator, problem, first, second, settings=hopper(), offset=1)
    assert torch.equal(actual, conv2d(operator, problem, first, second).to(torch.bfloat16))
    assert counted["wgmma"] == 0
    assert counted["mma"] > 0


H200 = Settings(sm=90, sm_count=132, hopper=True)
LARGE = {"n": 32, "c": 64, "k": 64, "h": 56, "w": 56}


def test_it_is_chosen_on_request_and_on_sm_90_alone() -> None:
    problem = Problem(**LARGE)  # type: ignore[arg-type]
    for operator in OPERATORS:
        chosen = select(operator, problem, torch.bfloat16, H200)
        assert chosen.family == "hopper"
        assert "never run on hardware" in chosen.reason
        for settings in (Settings(sm=90, sm_count=132), Settings(sm=80, hopper=True), Settings(sm=100, hopper=True)):
            assert select(operator, problem, torch.bfloat16, settings).family == "implicit_gemm"
    assert select("fprop", problem, torch.float32, H200).family == "direct", "fp32 stays fp32 unless tf32 is allowed"
    tf32 = Settings(sm=90, sm_count=132, hopper=True, allow_tf32=True)
    assert select("fprop", problem, torch.float32, tf32).family == "hopper"
    assert select("wgrad", problem, torch.float32, tf32).family == "implicit_gemm", "wgmma has no MN-major tf32"


@pytest.mark.parametrize(
    "sizes",
    [
        {"c": 3},
        {"c": 24},  # most of a k-tile would be zeros
        {"c": 60},  # not whole chunks of 16 bytes
        {"groups": 2},  # a k-tile would reach into the next group
        {"h": 90, "stride": (9, 1)},
        {"h": 300, "r": 3, "dilation": (128, 1), "pad": (0, 1)},  # an offset of 256
        {"h": 300, "r": 1, "pad": (129, 1)},
    ],
    ids=str,
)
def test_what_maps_cannot_hold_is_left_to_sm_80(sizes: dict[str, object]) -> None:
    problem = Problem(**{**LARGE, **sizes})  # type: ignore[arg-type]
    assert select("fprop", problem, torch.bfloat16, H200).family == "implicit_gemm"


def test_a_launch_of_what_maps_cannot_hold_is_refused() -> None:
    problem = Problem(n=1, c=60, k=8, h=4, w=4)
    first, second = operands("fprop", problem, torch.bfloat16, integers=True)
    with pytest.raises(KernelError, match="invalid_argument"):
        run_conv2d("fprop", problem, first, second, settings=hopper())


def test_tiles_follow_the_problem() -> None:
    for sizes, tile in (({"c": 256, "k": 256}, "128x256"), ({}, "128x64"), ({"k": 128}, "128x128")):
        chosen = select("fprop", Problem(**{**LARGE, **sizes}), torch.bfloat16, H200)  # type: ignore[arg-type]
        assert chosen.kernel == f"hopper_fprop_{tile}", sizes
