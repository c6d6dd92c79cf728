"""The CPU kernels run on torch's own threads: as many as torch was told, of the one OpenMP runtime that it loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import freezekit.functional as ff
from freezekit import _C

linux_openmp = pytest.mark.skipif(
    not (sys.platform == "linux" and torch.backends.openmp.is_available()), reason="torch without OpenMP, or not Linux"
)

ALONE = """
import os, re, torch, freezekit
torch.set_num_threads(4)
x = torch.empty(1 << 20).requires_grad_()
before = len(os.listdir("/proc/self/task"))
torch.ops.freezekit.activation_bits(x.detach(), "relu")
print(len(os.listdir("/proc/self/task")) - before)
maps = open("/proc/self/maps").read()
print(len({line.split()[-1] for line in maps.splitlines() if re.search(r"/lib(gomp|iomp5|omp)[^/]*\\.so", line)}))
"""


@linux_openmp
def test_a_kernel_starts_the_threads_that_torch_was_told() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started, runtimes = map(int, done.stdout.split())
    assert started == 3, "the kernel ran on one thread"
    assert runtimes == 1, "a second OpenMP runtime was loaded"


@linux_openmp
def test_the_extension_names_no_openmp_runtime_of_its_own() -> None:
    needed = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True)
    if needed.returncode:
        pytest.skip("no readelf")
    assert "omp" not in "".join(line for line in needed.stdout.splitlines() if "NEEDED" in line)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_the_same_on_any_number_of_threads(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(3, 67, 41, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.contiguous(memory_format=layout)
    functions = (ff.relu, ff.leaky_relu, lambda v: ff.max_pool2d(v, 3, 2, 1), lambda v: ff.max_pool2d(v, 3, 1, 1))
    results, outer = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            outputs = [function(leaf) for function in functions]
            gradients = [torch.autograd.grad(y, leaf, torch.cos(y.detach()))[0] for y in outputs]
            results.append([*outputs, *gradients])
    finally:
        torch.set_num_threads(outer)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
