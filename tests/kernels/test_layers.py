"""Activations with bits, gates, and max pooling with taps: selections, so every result is torch's to the bit."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .emulated import DTYPES, KernelError, check, library, pointer
from .reference import pack_mask

NUMELS = (0, 1, 7, 8, 9, 31, 32, 33, 255, 257, 2100)
ACTIVATIONS = {"relu": (0, 0.0, 0.0), "hardtanh": (1, -0.7, 1.1), "leaky_relu": (2, 0.3, 0.0)}
TAPS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(pointer(tensor))


def shifted(values: Tensor, offset: int) -> Tensor:
    """A copy that begins `offset` elements behind an aligned address."""
    room = torch.empty(values.numel() + offset, dtype=values.dtype)
    return room[offset:].copy_(values)


def special(numel: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, zeros, infinities and NaN."""
    x = torch.randn(numel, dtype=torch.float64, generator=torch.Generator().manual_seed(numel)).to(dtype) * 2
    for i, value in enumerate((0.0, -0.0, float("inf"), -float("inf"), float("nan"))):
        x[2 * i + 1 :: 17] = value
    return x


def words_of(keep: Tensor) -> Tensor:
    return pack_mask(keep.view(1, -1, 1, 1)) if keep.numel() else torch.empty(0, dtype=torch.int32)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~actual.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, dtype: torch.dtype, offset: int) -> None:
    kind, a, b = ACTIVATIONS[name]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    low, high = torch.tensor(a, dtype=wide), torch.tensor(b, dtype=wide)
    for numel in NUMELS:
        x = special(numel, dtype)
        values = x.to(wide)
        if name == "relu":
            expected, keep = values.relu(), ~(x <= 0)
        elif name == "leaky_relu":
            expected, keep = torch.where(values > 0, values, values * low), x > 0
        else:
            expected, keep = (
                values.clamp(low.to(dtype).to(wide), high.to(dtype).to(wide)),
                ~((values <= low) | (values >= high)),
            )
        for in_place in (False, True):
            given = shifted(x, offset)
            y = given if in_place else shifted(torch.full_like(x, 9.0), offset)
            words = torch.full(((numel + 31) // 32,), -1, dtype=torch.int32)
            numbers = (ctypes.c_double(a), ctypes.c_double(b))
            check(
                library().driver_activation(
                    kind, *numbers, address(given), address(y), address(words), ctypes.c_int64(numel), DTYPES[dtype]
                )
            )
            assert_same(y, expected.to(dtype))
            assert torch.equal(words, words_of(keep)), numel


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("select", "on", "off"), [(1, 1.0, 0.0), (0, 1.7, 0.3), (0, 1.25, 0.0)])
def test_gate(select: int, on: float, off: float, dtype: torch.dtype, offset: int) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for numel in NUMELS:
        x, keep = special(numel, dtype), torch.rand(numel, generator=torch.Generator().manual_seed(1)) < 0.5
        factor = torch.tensor([off, on], dtype=wide)[keep.long()]
        expected = torch.where(keep, x, 0) if select else (x.to(wide) * factor).to(dtype)
        words = words_of(keep)
        for in_place in (False, True):
            given = shifted(x, offset)
            out = given if in_place else shifted(torch.full_like(x, 9.0), offset)
            numbers = (ctypes.c_double(on), ctypes.c_double(off))
            check(
                library().driver_gate(
                    select, *numbers, address(given), address(words), address(out), ctypes.c_int64(numel), DTYPES[dtype]
                )
            )
            assert_same(out, expected)


@pytest.mark.parametrize("numel", NUMELS)
def test_bytes_become_bits(numel: int) -> None:
    keep = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.5
    words = torch.full(((numel + 31) // 32,), -1, dtype=torch.int32)
    check(library().driver_pack_bytes(address(keep), address(words), ctypes.c_int64(numel)))
    assert torch.equal(words, words_of(keep))


@dataclass(frozen=True)
class Pool:
    """One pooling; pairs are (height, width)."""

    size: tuple[int, int, int, int] = (2, 5, 9, 8)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def torch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        settings = (self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)
        return F.max_pool2d(x, *settings, return_indices=True)


POOLS = (
    Pool(),
    Pool(kernel=(2, 2), padding=(0, 0)),
    Pool(size=(1, 33, 7, 10), kernel=(3, 2), stride=(1, 3), padding=(1, 0), ceil_mode=True),
    Pool(size=(1, 4, 11, 9), stride=(1, 1), padding=(1, 1), dilation=(2, 3)),
    Pool(size=(2, 3, 6, 6), kernel=(1, 1), stride=(1, 1), padding=(0, 0)),
    Pool(size=(3, 1, 5, 300), kernel=(1, 5), stride=(1, 2), padding=(0, 2)),
    Pool(size=(1, 3, 23, 25), kernel=(4, 3), stride=(4, 5), padding=(2, 1), dilation=(3, 4), ceil_mode=True),
    Pool(size=(2, 3, 14, 15), kernel=(11, 12), stride=(3, 2), padding=(5, 6)),
)


def run(which: int, pool: Pool, nhwc: bool, first: Tensor, second: Tensor, third: Tensor, out: tuple[int, int]) -> None:
    """Tensors are NCHW ones or channels_last ones, by `nhwc`."""
    n, c, h, w = pool.size
    taps = second if which else third
    numbers = [n, c, int(nhwc), taps.element_size(), h, w, *out]
    numbers += [v for pair in (pool.kernel, pool.stride, pool.padding, pool.dilation) for v in pair]
    code = DTYPES[first.dtype]
    check(
        library().driver_max_pool(
            which, (ctypes.c_int64 * 16)(*numbers), code, address(first), address(second), address(third)
        )
    )


@pytest.mark.parametrize("tap_bytes", TAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_max_pool(pool: Pool, nhwc: bool, dtype: torch.dtype, tap_bytes: int) -> None:
    layout = torch.channels_last if nhwc else torch.contiguous_format

    def laid_out(tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=layout)

    # Small integers, so that many are equal and the first tap of each window must win.
    x = torch.randint(-3, 4, pool.size, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[0, 0, 2:4, 1:3] = float("nan")
    x[0, 0, 0, 0] = float("inf")
    x[-1, -1] = -float("inf")
    expected, indices = pool.torch(x)
    p, q = expected.shape[2:]
    y = laid_out(torch.full_like(expected, 9.0))
    taps = laid_out(torch.full(expected.shape, 77, dtype=TAPS[tap_bytes]))
    run(0, pool, nhwc, laid_out(x), y, taps, (p, q))
    assert_same(y.contiguous(), expected)
    tap = taps.long()
    rows = torch.arange(p)[:, None] * pool.stride[0] - pool.padding[0] + tap // pool.kernel[1] * pool.dilation[0]
    columns = torch.arange(q) * pool.stride[1] - pool.padding[1] + tap % pool.kernel[1] * pool.dilation[1]
    assert torch.equal(rows * pool.size[3] + columns, indices)

    dy = torch.randint(-4, 5, expected.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    dx = laid_out(torch.full(pool.size, 9.0, dtype=dtype))
    run(1, pool, nhwc, laid_out(dy), taps, dx, (p, q))
    flat = torch.zeros(*pool.size[:2], pool.size[2] * pool.size[3], dtype=torch.float64)
    wanted = flat.scatter_add(2, indices.flatten(2), dy.double().flatten(2)).view(pool.size)
    assert torch.equal(dx.double(), wanted)

    again = laid_out(torch.full_like(expected, 9.0))
    run(2, pool, nhwc, laid_out(x), taps, again, (p, q))
    assert_same(again.contiguous(), expected)


def test_a_gradient_costs_the_windows_that_hold_an_element_and_not_their_taps() -> None:
    """As torch's kernel: what is proven of common windows must not be slower for large ones."""
    seconds = {}
    for extent in (2, 128):
        pool = Pool(size=(1, 8, 128, 128), kernel=(extent, extent), stride=(extent, extent), padding=(0, 0))
        out = (128 // extent, 128 // extent)
        dy, taps = torch.ones(1, 8, *out), torch.zeros(1, 8, *out, dtype=torch.int16)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            run(1, pool, False, dy, taps, torch.empty(pool.size), out)
            times.append(time.perf_counter() - begin)
        seconds[extent] = min(times)
    assert seconds[128] < 2 * seconds[2]


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_sums_are_made_in_the_order_of_outputs(nhwc: bool) -> None:
    """Overlapping windows that all take one element: float32 sums in any other order differ."""
    pool = Pool(size=(1, 2, 8, 8), stride=(1, 1))
    x = torch.zeros(pool.size)
    x[:, :, 3, 4] = 1.0
    expected, indices = pool.torch(x)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    y, taps = (torch.empty(expected.shape, dtype=d).clone(memory_format=layout) for d in (torch.float32, torch.uint8))
    run(0, pool, nhwc, x.clone(memory_format=layout), y, taps, (8, 8))
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    dx = torch.empty(pool.size).clone(memory_format=layout)
    run(1, pool, nhwc, dy.clone(memory_format=layout), taps, dx, (8, 8))
    wanted = torch.zeros(2, 64)
    for c in range(2):
        for place, value in zip(indices[0, c].flatten().tolist(), dy[0, c].flatten()):
            wanted[c, place] += value
    assert torch.equal(dx, wanted.view(pool.size))


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_taps_from_elsewhere_lead_nowhere(nhwc: bool) -> None:
    """Taps that no window has, or that are in the padding: zeros, and no access outside (the sanitizer's job)."""
    pool = Pool(size=(1, 3, 4, 4), kernel=(3, 3), stride=(2, 2))
    layout = torch.channels_last if nhwc else torch.contiguous_format
    x = torch.ones(pool.size).clone(memory_format=layout)
    y = torch.full((1, 3, 2, 2), 9.0).clone(memory_format=layout)
    taps = torch.full((1, 3, 2, 2), 200, dtype=torch.uint8).clone(memory_format=layout)
    run(2, pool, nhwc, x, taps, y, (2, 2))
    assert not y.any()
    dx = torch.full(pool.size, 9.0).clone(memory_format=layout)
    run(1, pool, nhwc, y + 1, taps, dx, (2, 2))
    assert not dx.any()


def test_windows_without_a_place_give_minus_infinity() -> None:
    pool = Pool(size=(1, 1, 2, 2), kernel=(2, 2), stride=(1, 1), padding=(1, 1), dilation=(3, 3))
    x = torch.ones(pool.size)
    expected = torch.empty(1, 1, 1, 1)
    taps = torch.full((1, 1, 1, 1), 9, dtype=torch.uint8)
    run(0, pool, False, x, expected, taps, (1, 1))
    assert expected.item() == -float("inf")


def test_what_cannot_be_is_refused() -> None:
    x = torch.ones(1, 1, 4, 4)
    pool = Pool(size=(1, 1, 4, 4), kernel=(2, 2), padding=(0, 0), stride=(0, 2))
    with pytest.raises(KernelError, match="invalid_argument"):
        run(0, pool, True, x, torch.empty(4), torch.empty(4, dtype=torch.uint8), (2, 2))
    huge = Pool(size=(1, 1 << 16, 1 << 8, 1 << 8), kernel=(2, 2), padding=(0, 0))
    with pytest.raises(KernelError, match="invalid_argument"):
        run(0, huge, True, x, torch.empty(4), torch.empty(4, dtype=torch.uint8), (1 << 7, 1 << 7))


def test_empty_tensors_launch_nothing() -> None:
    pool = Pool(size=(0, 3, 4, 4), kernel=(2, 2), padding=(0, 0))
    nothing, taps = torch.empty(0), torch.empty(0, dtype=torch.uint8)
    run(0, pool, True, nothing, nothing, taps, (2, 2))
    run(1, pool, True, nothing, taps, nothing, (2, 2))
