"""What the CUDA build may cost: kernels an operator and dtype, and the size of the binary."""

from __future__ import annotations

import collections
import re
import subprocess
from pathlib import Path

import pytest

import freezekit._C as _C
from tests.conformance.drivers import cuda_objects, find_nvcc

KERNEL = re.compile(r" (?:void )?freezekit::(?:\(anonymous namespace\)::)?((\w+_kernel)<([^>,]+).*?>)\(")
# The project's own bound is about 12 an operator and dtype; gathers compute two operators, fprop and dgrad.
MOST = 12
GATHERS = {"conv2d_implicit_gemm_kernel", "conv2d_direct_gather_kernel", "depthwise_generic_gather_kernel"}
MOST_BYTES = 10 << 20


def instantiations() -> dict[tuple[str, str], set[str]]:
    """(kernel, first template argument) -> its instantiations, from the symbols of the build's CUDA objects."""
    found = collections.defaultdict(set)
    for path in cuda_objects():
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        for match in KERNEL.finditer(symbols):
            found[match[2], match[3]].add(match[1])
    return found


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_few_instantiations_an_operator_and_dtype() -> None:
    found = instantiations()
    assert {"__half", "__nv_bfloat16", "float"} == {d for name, d in found if name == "conv2d_implicit_gemm_kernel"}
    many = {key: len(made) for key, made in found.items() if len(made) > MOST * (1 + (key[0] in GATHERS))}
    assert not many


@pytest.mark.skipif(not _C.has_cuda_kernels(), reason="needs CUDA kernels in the build")
def test_the_binary_is_small() -> None:
    assert Path(_C.__file__).stat().st_size <= MOST_BYTES
