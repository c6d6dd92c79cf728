"""The kernels as they are: every bit right under every schedule, nothing found by a sanitizer, no bank conflict."""

from __future__ import annotations

import pytest

from tests.kernels.emulated import OPERATORS

from .build import MODES, UNMODIFIED, Planted, Program, Result, kernel_host_sources, kernel_sources, run
from .cases import (
    CHUNKS,
    DEPTHWISE,
    DEPTHWISE_3,
    DIRECT,
    GEMM,
    GEMM_LONG,
    HOPPER,
    HOPPER_WIDE,
    SMALL,
    STRIDED,
    WIDE,
    Case,
    gemm,
    hopper,
    texts,
)

REFERENCE = ("tests/emulator/conv_driver.cpp", "tests/emulator/conv_reference.cpp")
CONV = Program("conv", kernel_sources(), (*kernel_host_sources(), *REFERENCE))
SMALL_KERNELS = Program("small", kernel_sources(), (*kernel_host_sources(), "tests/emulator/small_driver.cpp"))

# (mode, seed, cp.async): seeds 0 and 1 run threads and blocks forward and backward, others shuffled.
QUICK = [
    ("plain", 0, "lazy"),
    ("plain", 1, "eager"),
    ("plain", 2, "mixed"),
    ("ucontext", 3, "lazy"),
    ("asan", 0, "lazy"),
    ("tsan", 2, "lazy"),
]
FULL = [(mode, seed, cp) for mode in MODES for seed in (0, 1, 5, 6) for cp in ("lazy", "eager", "mixed")]
CASES = {"direct": DIRECT, "depthwise": DEPTHWISE, "hopper": HOPPER, **GEMM}
SMALL_JOBS = [
    *("bias:1,1", "bias:7,33", "bias:300,40", "bias:0,5"),
    *("filter:1,1,1", "filter:33,40,3", "filter:8,5,9"),
    *("norm:1", "norm:128", "norm:300"),
    *("activation:1", "activation:31", "activation:64", "activation:3001", "bytes:1", "bytes:64", "bytes:999"),
    *("pool:2,3,7,9,3,2,1,1", "pool:1,33,6,5,2,2,0,1", "pool:1,2,9,8,3,1,2,2", "pool:3,1,4,4,1,1,0,1"),
]
# Three slices or more that are not empty, since two have the same sum in either order; a slice is whole k-tiles.
SUMS = [
    *(Case("wgrad", p, dtype, "direct", split_k=split) for p, dtype, split in ((SMALL, "f32", 3), (WIDE, "f16", 4))),
    Case("wgrad", STRIDED, "f64", "direct", split_k=5),
    *(gemm(dtype, op, CHUNKS) for dtype in GEMM for op in ("fprop", "dgrad")),
    *(gemm(dtype, "wgrad", GEMM_LONG, split_k=3) for dtype in GEMM),
    *(Case("wgrad", DEPTHWISE_3, dtype, "depthwise", config, 4) for dtype in ("f32", "f16") for config in (0, 1)),
    *(hopper(op, HOPPER_WIDE, split_k=3 if op == "wgrad" else 1) for op in OPERATORS),
]


def run_convolutions(
    mode: str, seed: int, cp_async: str, cases: list[Case], planted: Planted = UNMODIFIED, data: str = "integers"
) -> Result:
    return run(CONV, MODES[mode], (str(seed), cp_async, data, *texts(cases)), planted)


def run_small(mode: str, seed: int, jobs: list[str], planted: Planted = UNMODIFIED) -> Result:
    return run(SMALL_KERNELS, MODES[mode], (str(seed), "lazy", *jobs), planted)


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(("mode", "seed", "cp_async"), QUICK)
def test_convolutions_are_clean(mode: str, seed: int, cp_async: str, cases: str) -> None:
    result = run_convolutions(mode, seed, cp_async, CASES[cases])
    assert result.code == 0, str(result)


@pytest.mark.full
@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(("mode", "seed", "cp_async"), FULL)
def test_convolutions_are_clean_in_the_whole_matrix(mode: str, seed: int, cp_async: str, cases: str) -> None:
    result = run_convolutions(mode, seed, cp_async, CASES[cases])
    assert result.code == 0, str(result)


@pytest.mark.parametrize(("mode", "seed"), [("plain", 1), ("asan", 0), ("tsan", 2)])
def test_small_kernels_are_clean(mode: str, seed: int) -> None:
    result = run_small(mode, seed, SMALL_JOBS)
    assert result.code == 0, str(result)


@pytest.mark.full
@pytest.mark.parametrize(("mode", "seed"), [(mode, seed) for mode in MODES for seed in (0, 1, 5, 6)])
def test_small_kernels_are_clean_in_the_whole_matrix(mode: str, seed: int) -> None:
    result = run_small(mode, seed, SMALL_JOBS)
    assert result.code == 0, str(result)


def test_sums_repeat_bit_for_bit_under_any_schedule() -> None:
    first = run_convolutions("plain", 0, "lazy", SUMS, data="reals")
    assert first.code == 0, str(first)
    assert len(set(first.output.split("\n"))) == len(SUMS) + 1, str(first)
    for seed in (1, 2, 3):
        assert run_convolutions("plain", seed, "lazy", SUMS, data="reals").output == first.output
