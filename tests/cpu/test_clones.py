"""csrc/cpu compiled for each instruction set that the package has clones for: every one gives the same bits.

Of codes, which arithmetic with and without fused steps may round to neighbours, every one is within the bound.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.smooth import SMOOTH

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cpu-tests"
TARGETS = {
    "x86-64": [],
    "x86-64-v3": ["avx2", "f16c", "fma"],
    "x86-64-v4": ["avx512f", "avx512bw", "avx512dq", "avx512vl"],
}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
KINDS = ("relu", "leaky_relu", "hardtanh", "select", "scale")
NUMELS = (0, 1, 7, 31, 32, 33, 100, 1024, 4099)


@functools.cache
def library(target: str) -> ctypes.CDLL:
    """The driver for an instruction set, with the optimisations of csrc/cpu/simd.h; skips where it cannot run."""
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    if missing := [flag for flag in TARGETS[target] if flag not in flags]:
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    out = BUILD / f"{target}.so"
    options = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", f"-march={target}", "-fPIC", "-shared"]
    options += ["-Wno-psabi"]  # vectors that such a processor has not are passed to nothing: all is inlined
    command = [
        "g++",
        *options,
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{ROOT / 'csrc'}",
        str(HERE / "driver.cpp"),
        "-o",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(out))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def gate(target: str, kind: str, x: Tensor, bits: Tensor, a: float, b: float, in_place: bool = False) -> Tensor:
    y = x.clone() if in_place else torch.full_like(x, 7.0)
    library(target).driver_gate(
        DTYPES[x.dtype],
        KINDS.index(kind),
        pointer(y if in_place else x),
        pointer(y),
        pointer(bits),
        ctypes.c_int64(x.numel()),
        ctypes.c_double(a),
        ctypes.c_double(b),
    )
    return y


def values(numel: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, both zeros, subnormal ones, infinities and NaN."""
    x = torch.randn(numel, dtype=torch.float64, generator=torch.Generator().manual_seed(numel)).to(dtype) * 3
    tiny = torch.finfo(dtype).smallest_normal / 4
    for i, special in enumerate((0.0, -0.0, tiny, -tiny, float("inf"), -float("inf"), float("nan"), -float("nan"))):
        x[i * 3 + 1 :: 29] = special
    return x


def pack(keep: Tensor) -> Tensor:
    padded = F.pad(keep.long(), (0, -keep.numel() % 32)).view(-1, 32)
    return (padded << torch.arange(32)).sum(1).to(torch.int32)


def expected(kind: str, x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Value and kept elements by torch; the CPU's arithmetic on 16-bit numbers is that of float, rounded once."""
    wide = x if x.dtype == torch.float64 else x.float()
    a, b = (torch.tensor(v, dtype=wide.dtype) for v in (a, b))
    if kind == "relu":
        return wide.relu().to(x.dtype), ~(x <= 0)
    if kind == "leaky_relu":
        return torch.where(wide > 0, wide, wide * a).to(x.dtype), x > 0
    low, high = (v.to(x.dtype).to(wide.dtype) for v in (a, b))
    return wide.clamp(low, high).to(x.dtype), (wide > a) & (wide < b)


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    """Equal values, NaN where a NaN is wanted. (torch itself gives both zeros for relu(-0.0), by position.)"""
    assert actual.dtype == wanted.dtype
    assert torch.equal(actual.isnan(), wanted.isnan())
    assert torch.equal(actual[~actual.isnan()], wanted[~wanted.isnan()])


def assert_identical(actual: Tensor, wanted: Tensor) -> None:
    """Equal bits, but that a NaN is a NaN."""
    assert_same(actual, wanted)
    assert torch.equal(actual[~actual.isnan()].signbit(), wanted[~wanted.isnan()].signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "a", "b"), [("relu", 0, 0), ("leaky_relu", 0.3, 0), ("hardtanh", -0.7, 1.1)])
@pytest.mark.parametrize("target", TARGETS)
def test_bits_and_values_are_those_of_torch(target: str, kind: str, a: float, b: float, dtype: torch.dtype) -> None:
    for numel in NUMELS:
        x = values(numel, dtype)
        wanted, keep = expected(kind, x, a, b)
        for in_place in (False, True):
            bits = torch.full(((numel + 31) // 32,), -1, dtype=torch.int32)
            y = gate(target, kind, x, bits, a, b, in_place)
            assert_same(y, wanted)
            assert torch.equal(bits, pack(keep)), numel
            assert_identical(y, gate("x86-64", kind, x, bits, a, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "on", "off"), [("select", 1.0, 0.0), ("scale", 1.7, 0.3), ("scale", 1.25, 0.0)])
@pytest.mark.parametrize("target", TARGETS)
def test_bits_are_applied_as_torch_would(target: str, kind: str, on: float, off: float, dtype: torch.dtype) -> None:
    for numel in NUMELS:
        x, keep = values(numel, dtype), torch.rand(numel, generator=torch.Generator().manual_seed(1)) < 0.5
        wide = x if dtype == torch.float64 else x.float()
        factor = torch.tensor([off, on], dtype=wide.dtype)[keep.long()]
        wanted = torch.where(keep, x, 0) if kind == "select" else (wide * factor).to(dtype)
        for in_place in (False, True):
            y = gate(target, kind, x, pack(keep), on, off, in_place)
            assert_same(y, wanted)
            assert_identical(y, gate("x86-64", kind, x, pack(keep), on, off))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_16_bit_numbers_convert_as_in_torch(target: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(2**16)
    library(target).driver_to_float(DTYPES[dtype], pointer(every), pointer(wide), ctypes.c_int64(2**16))
    assert_identical(wide, every.view(dtype).float())
    finite = wide[wide.isfinite()].sort().values
    # Every number there is, the middle between each and the next, and the floats beside that middle.
    middle = (finite[1:] + finite[:-1]) / 2
    beside = [middle.nextafter(torch.tensor(sign * float("inf"))) for sign in (1, -1)]
    edges = torch.tensor([65519.0, 65520.0, 65521.0, 3.39e38, float("inf"), float("nan"), 2.0**-25, 2.0**-26, 1e-45])
    x = torch.cat([finite, middle, *beside, edges, -edges])
    narrow = torch.empty(x.numel(), dtype=dtype)
    library(target).driver_from_float(DTYPES[dtype], pointer(x), pointer(narrow), ctypes.c_int64(x.numel()))
    assert_identical(narrow, x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 7, 16, 65])
@pytest.mark.parametrize("target", TARGETS)
def test_pooled_pixels_are_those_of_torch(target: str, channels: int, dtype: torch.dtype) -> None:
    x = values(channels * 9 * 11, dtype).view(1, 9, 11, channels).permute(0, 3, 1, 2)
    for kernel, stride, padding, dilation in ((3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 2)):
        wanted, indices = F.max_pool2d(x, kernel, stride, padding, dilation, return_indices=True)
        p, q = wanted.shape[2:]
        y = torch.full((p, q, channels), 7.0, dtype=dtype)
        taps = torch.full((p, q, channels), 255, dtype=torch.uint8)
        sizes = (ctypes.c_int64 * 12)(9, 11, p, q, *(v for v in (kernel, stride, padding, dilation) for _ in range(2)))
        library(target).driver_max_pool(
            DTYPES[dtype], pointer(x), pointer(y), pointer(taps), sizes, ctypes.c_int64(channels)
        )
        assert_same(y, wanted[0].permute(1, 2, 0).contiguous())
        tap = taps.long()
        rows = torch.arange(p)[:, None, None] * stride - padding + tap // kernel * dilation
        columns = torch.arange(q)[None, :, None] * stride - padding + tap % kernel * dilation
        assert torch.equal(rows * 11 + columns, indices[0].permute(1, 2, 0))


@pytest.mark.parametrize("factor", [1.0, 1.702, -40.0])
@pytest.mark.parametrize("f", [torch.sigmoid, F.silu])
@pytest.mark.parametrize("target", TARGETS)
def test_sigmoids_are_those_of_torch(target: str, f: Callable[[Tensor], Tensor], factor: float) -> None:
    uses = torch.backends.cpu.get_cpu_capability()
    pairs = {"AVX512": 32, "AVX2": 16}.get(uses) or pytest.skip(f"torch uses {uses} of this processor")
    driver = library(target)
    # Numbers of which e^x is next to the middle of two floats, and those where it leaves float's range.
    edges = [-6.584898, -7.9711924, -13.51637, -41.935406, -70.35444, 87.3, 88.0, 88.8, 103.9, 104.1, 1e9]
    for numel in (*NUMELS, 40_000):
        x = values(numel, torch.float32)
        x[2::41] = torch.tensor((edges + [-e for e in edges]) * (numel // 900 + 1))[: x[2::41].numel()]
        wanted = f(x * factor) if factor != 1 else f(x)
        y = torch.full_like(x, 7.0)
        options = (ctypes.c_bool(f is F.silu), ctypes.c_float(factor), pointer(x), pointer(y))
        sizes = (ctypes.c_int64(numel - numel % pairs), ctypes.c_int64(numel))
        driver.driver_sigmoid(*options, *sizes)
        assert_identical(y, wanted)
        driver.driver_is_sigmoid.restype = ctypes.c_bool
        assert driver.driver_is_sigmoid(*options, *sizes)
        for i in {0, numel // 2, numel - 1} if numel else ():
            y.view(torch.int32)[i] ^= 1
            assert not driver.driver_is_sigmoid(*options, *sizes), i
            y.view(torch.int32)[i] ^= 1


# Of 8 and 4 bits: codes in a unit, and that of 0.
SMOOTH_GRIDS = {
    "silu": ((212, 21), (12, 1)),
    "gelu": ((202, 26), (11, 1)),
    "gelu_tanh": ((202, 26), (11, 1)),
    "mish": ((211, 24), (12, 1)),
    "hardswish": ((127, 63), (7, 3)),
    "softplus": ((254, 0), (14, 0)),
}


def unpacked(codes: Tensor, bits: int, numel: int) -> Tensor:
    """One code for each element."""
    if bits == 8:
        return codes
    blocks = [codes[i : i + 32] for i in range(0, codes.numel(), 32)]
    return torch.cat([codes[:0], *(torch.cat([block & 15, block >> 4]) for block in blocks)])[:numel]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("target", TARGETS)
def test_codes_are_the_nearest(target: str, name: str, dtype: torch.dtype) -> None:
    for numel in NUMELS:
        x = (torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * 3).to(dtype)
        leaf = x.double().requires_grad_()
        (derivative,) = torch.autograd.grad(SMOOTH[name](leaf).sum(), leaf)
        x[::17] = float("nan")
        for bits, (unit, zero) in zip((8, 4), SMOOTH_GRIDS[name], strict=True):
            codes = torch.full(((numel * bits + 7) // 8,), 0, dtype=torch.uint8)
            library(target).driver_encode(
                DTYPES[dtype], list(SMOOTH).index(name), bits, pointer(x), pointer(codes), ctypes.c_int64(numel)
            )
            single = unpacked(codes, bits, numel)
            assert torch.equal(single == 2**bits - 1, x.isnan())
            far = ((single.double() - zero) / unit - derivative).abs()[~x.isnan()]
            assert bool((far <= 0.5 / unit + 2e-6).all())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_codes_are_applied_to_the_bit(target: str, dtype: torch.dtype, bits: int) -> None:
    unit, zero = SMOOTH_GRIDS["silu"][0 if bits == 8 else 1]
    for numel in NUMELS:
        dy, dx = values(numel, dtype), torch.full((numel,), 7.0, dtype=dtype)
        codes = torch.randint(0, 256, ((numel * bits + 7) // 8,), dtype=torch.uint8)
        library(target).driver_decode(
            DTYPES[dtype], bits, pointer(dy), pointer(codes), pointer(dx), ctypes.c_int64(numel)
        )
        single = unpacked(codes, bits, numel)
        derivative = torch.where(single == 2**bits - 1, float("nan"), (single.float() - zero) / unit)
        assert_identical(dx, (dy.float() * derivative).to(dtype))


def winograd(
    target: str, lanes: int, x: Tensor, w: Tensor, padding: tuple[int, int], nhwc: bool
) -> tuple[Tensor, bool]:
    n, c, h, width = x.shape
    p, q = h + 2 * padding[0] - 2, width + 2 * padding[1] - 2
    sizes = (ctypes.c_int64 * 9)(n, c, w.shape[0], h, width, p, q, *padding)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    x, y = x.contiguous(memory_format=layout), torch.full((n, w.shape[0], p, q), 7.0).contiguous(memory_format=layout)
    run = library(target).driver_winograd
    run.restype = ctypes.c_bool
    return y, run(lanes, sizes, ctypes.c_bool(nhwc), pointer(x), pointer(w), pointer(y))


@pytest.mark.parametrize("padding", [(1, 1), (0, 2), (4, 0)])
@pytest.mark.parametrize("target", TARGETS)
def test_winograd_convolutions_are_exact_on_integers_and_the_same_everywhere(
    target: str, padding: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    for size, filters in (((2, 32, 7, 9), 64), ((1, 64, 12, 23), 32), ((1, 32, 3, 400), 96), ((9, 32, 4, 5), 32)):
        x = torch.randint(-4, 5, size, generator=generator).float()
        w = torch.randint(-4, 5, (filters, size[1], 3, 3), generator=generator).float()
        noise = torch.randn(size, generator=generator)
        same = []
        for lanes in (8, 16):
            for nhwc in (False, True):
                y, finite = winograd(target, lanes, x, w, padding, nhwc)
                assert finite
                assert torch.equal(y.double(), F.conv2d(x.double(), w.double(), padding=padding))
                same.append(winograd(target, lanes, noise, w, padding, nhwc)[0])
                for value in (float("inf"), float("nan"), 3e38):
                    spoilt = x.clone()
                    spoilt[-1, 5, 2, 3], spoilt[-1, 5, 0, 3] = value, -value
                    assert not winograd(target, lanes, spoilt, w, padding, nhwc)[1]
        assert all(torch.equal(other, same[0]) for other in same[1:])
        if target == "x86-64-v4":
            assert torch.equal(same[0], winograd("x86-64-v3", 8, noise, w, padding, True)[0])
