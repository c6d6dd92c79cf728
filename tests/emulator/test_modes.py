"""The kernels as they are: every bit right under every schedule, nothing found by a sanitizer, no bank conflict."""

from __future__ import annotations

import pytest

from .build import MODES, Program, kernel_host_sources, kernel_sources, run
from .cases import DIRECT, texts

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


@pytest.mark.parametrize(("mode", "seed", "cp_async"), QUICK)
def test_direct_kernels_are_clean(mode: str, seed: int, cp_async: str) -> None:
    result = run(CONV, MODES[mode], (str(seed), cp_async, *texts(DIRECT)))
    assert result.code == 0, result


@pytest.mark.full
@pytest.mark.parametrize(("mode", "seed", "cp_async"), FULL)
def test_direct_kernels_are_clean_in_the_whole_matrix(mode: str, seed: int, cp_async: str) -> None:
    test_direct_kernels_are_clean(mode, seed, cp_async)
