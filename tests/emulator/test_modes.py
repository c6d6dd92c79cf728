"""The kernels as they are: every bit right under every schedule, nothing found by a sanitizer, no bank conflict."""

from __future__ import annotations

import pytest

from .build import MODES, Program, kernel_host_sources, kernel_sources, run
from .cases import DIRECT, GEMM, texts

DRIVER = ("tests/emulator/conv_driver.cpp", "tests/emulator/conv_reference.cpp")
CONV = Program("conv", kernel_sources(), (*kernel_host_sources(), *DRIVER))

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


CASES = {"direct": DIRECT, **GEMM}


def check(mode: str, seed: int, cp_async: str, cases: str) -> None:
    result = run(CONV, MODES[mode], (str(seed), cp_async, *texts(CASES[cases])))
    assert result.code == 0, str(result)


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(("mode", "seed", "cp_async"), QUICK)
def test_kernels_are_clean(mode: str, seed: int, cp_async: str, cases: str) -> None:
    check(mode, seed, cp_async, cases)


@pytest.mark.full
@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(("mode", "seed", "cp_async"), FULL)
def test_kernels_are_clean_in_the_whole_matrix(mode: str, seed: int, cp_async: str, cases: str) -> None:
    check(mode, seed, cp_async, cases)
