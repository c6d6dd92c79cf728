"""Malformed calls of the raw operators under AddressSanitizer and UBSan: the checks touch no memory they should not.

The torch layer is compiled anew with both, without CUDA, and loaded into a Python that has libasan preloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CXX = shutil.which("g++")
SANITIZE = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer"

CALLS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.freezekit
G, X, W = torch.ones(2, 6, 6, 6), torch.ones(2, 4, 8, 8), torch.ones(6, 4, 3, 3)
BIG = [2**31 - 1, 2**31, 2**40, 2**59, 2**62, 2**63 - 1, -1, -2**63, 0]
lies = [(), (2,), (2, 4, 8), (2, 4, 8, 8, 1)] + [(2, 4, b, 8) for b in BIG] + [(b, 4, 8, 8) for b in BIG]
lies += [(b, b, b, b) for b in BIG] + [(2, b, 8, b) for b in BIG]
settings = [{}] + [{k: [b, b]} for k in ("stride", "padding", "dilation") for b in BIG] + [{"groups": b} for b in BIG]
settings += [{"stride": v} for v in ([], [1, 1, 1])]
refused = 0
def call(f):
    global refused
    try:
        f()
    except (RuntimeError, NotImplementedError, ValueError):
        refused += 1
from torch.func import vmap
for device in ("cpu", "meta"):
    g, x, w = (t.to(device) for t in (G, X, W))
    odd = [torch.ones((4,) * rank, device=device) for rank in (0, 1, 2, 3, 5)] + [torch.ones(0, 4, 0, 8, device=device)]
    for s in settings:
        call(lambda: ops.conv2d(x, w, **s))
        for size in lies:
            for grad in (False, True):
                call(lambda: ops.conv2d_dgrad(g.requires_grad_(grad), w, size, **s))
                call(lambda: ops.conv2d_wgrad(g.requires_grad_(grad), x, size, **s))
        g = g.detach()
    for t in odd:
        for f in (lambda: ops.conv2d(t, w), lambda: ops.conv2d(x, t), lambda: ops.conv2d(x, w, t),
                  lambda: ops.conv2d_dgrad(t, w, x.shape), lambda: ops.conv2d_dgrad(g, t, x.shape),
                  lambda: ops.conv2d_wgrad(t, x, w.shape), lambda: ops.conv2d_wgrad(g, t, w.shape)):
            call(f)
for size in lies:
    call(lambda: vmap(lambda g: ops.conv2d_dgrad(g, W, size))(torch.stack([G, G])))
    call(lambda: vmap(lambda g: ops.conv2d_wgrad(g, X, size))(torch.stack([G, G])))
    call(lambda: ops.conv2d_dgrad(G.cfloat(), W.cfloat(), size))
y = ops.conv2d(X.requires_grad_(), W.requires_grad_())
y.sum().backward()
print("refused", refused)
"""


def library(path: str) -> str:
    assert CXX is not None
    return subprocess.run([CXX, f"-print-file-name={path}"], capture_output=True, text=True, check=True).stdout.strip()


def clean(arguments: list[str], env: dict[str, str]) -> str:
    """What Python printed, once no sanitizer has spoken."""
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "runtime error" not in run.stderr, run.stderr[-4000:]
    return run.stdout


@pytest.mark.full
@pytest.mark.skipif(CXX is None or not sys.platform.startswith("linux"), reason="needs g++ and its libasan")
def test_malformed_calls_under_asan(tmp_path: Path) -> None:
    assert CXX is not None
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    includes = [f"-I{path}" for path in (CSRC, *include_paths())]
    sources = [*sorted((CSRC / "torch").rglob("*.cpp")), *sorted((CSRC / "kernels").rglob("*.cpp"))]

    def compiled(source: Path) -> str:
        target = str(tmp_path / f"{source.parent.name}.{source.stem}.o")
        flags = [*SANITIZE.split(), "-std=c++20", "-O1", "-g1", "-fPIC", abi, *includes]
        subprocess.run([CXX, *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compiled, sources))
    built = str(tmp_path / "freezekit_asan.so")
    paths = [f"-L{path}" for path in library_paths()]
    torch_libraries = ["-lc10", "-ltorch", "-ltorch_cpu"]
    subprocess.run(
        [CXX, "-shared", *SANITIZE.split(), *objects, *paths, *torch_libraries, "-ldl", "-o", built], check=True
    )
    env = dict(os.environ, LD_PRELOAD=f"{library('libasan.so')} {library('libubsan.so')}", OMP_NUM_THREADS="1")
    env.update(
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=1:allocator_may_return_null=1", UBSAN_OPTIONS="print_stacktrace=1"
    )
    assert int(clean(["-c", CALLS, built], env).split("refused")[1]) > 3000
    refused, taken = map(int, clean(["-W", "ignore", "-m", "tests.dropin.hostile", built, "600"], env).split())
    assert refused > 1500
    assert taken > 300
