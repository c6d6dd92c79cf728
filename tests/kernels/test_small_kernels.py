"""Filter transform, layout change, mask pack and apply."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from .emulated import DTYPES, KernelError, Problem, check, library, pointer
from .reference import pack_mask

SIZES = [Problem(c=3, k=5), Problem(c=34, k=65, r=1, s=2), Problem(c=12, k=8, groups=4), Problem(c=6, k=6, groups=6)]
SAME = [(dtype, dtype) for dtype in DTYPES]
CASTS = [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]


def transform(problem: Problem, weight: Tensor, to: torch.dtype, transposed: bool, scale: Tensor | None) -> Tensor:
    """The flat result; weight is (K, C/G, R, S) with any strides."""
    out = torch.full((weight.numel(),), float("nan"), dtype=to)
    status = library().driver_filter_transform(
        (ctypes.c_int64 * 16)(*problem.flat),
        DTYPES[weight.dtype],
        DTYPES[to],
        int(transposed),
        (ctypes.c_int64 * 4)(*weight.stride()),
        ctypes.c_void_p(pointer(scale)),
        ctypes.c_void_p(pointer(weight)),
        ctypes.c_void_p(pointer(out)),
    )
    check(status)
    return out


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("source", "to"), SAME + CASTS, ids=str)
def test_filter_transform(
    source: torch.dtype, to: torch.dtype, transposed: bool, memory_format: torch.memory_format
) -> None:
    for problem in SIZES:
        weight = torch.randn(problem.sizes["filter"], dtype=torch.float64).to(source)
        weight = weight.contiguous(memory_format=memory_format)
        wide = torch.float64 if source == torch.float64 else torch.float32
        for scale in (None, torch.randn(problem.k, dtype=wide)):
            expected = weight if scale is None else weight.to(wide) * scale[:, None, None, None]
            k, c, r, s = weight.shape
            grouped = expected.to(to).view(problem.groups, k // problem.groups, c, r, s)
            expected = grouped.permute((0, 2, 3, 4, 1) if transposed else (0, 1, 3, 4, 2))
            actual = transform(problem, weight, to, transposed, scale)
            assert torch.equal(actual, expected.reshape(-1)), problem


def test_a_cast_that_is_not_there_is_refused() -> None:
    with pytest.raises(KernelError, match="unsupported"):
        transform(SIZES[0], torch.ones(SIZES[0].sizes["filter"]), torch.float64, False, None)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 33, 4, 16), (3, 64, 1, 1), (0, 4, 2, 2), (1, 1, 40, 40)], ids=str)
def test_layout_change(size: tuple[int, ...], dtype: torch.dtype) -> None:
    nchw = torch.randn(size, dtype=torch.float64).to(dtype)
    nhwc = nchw.permute(0, 2, 3, 1).contiguous()
    for change, source, expected in ((0, nchw, nhwc), (1, nhwc, nchw)):
        out = torch.full(expected.shape, float("nan"), dtype=dtype)
        check(
            library().driver_layout_change(
                change,
                (ctypes.c_int64 * 4)(*size),
                DTYPES[dtype],
                ctypes.c_void_p(pointer(source)),
                ctypes.c_void_p(pointer(out)),
            )
        )
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 255, 257, 1000])
def test_mask_pack_and_apply(numel: int, dtype: torch.dtype) -> None:
    values = torch.randn(numel, dtype=torch.float64).to(dtype)
    values[::7] = 0.0
    values[3::11] = float("nan")
    words = torch.full(((numel + 31) // 32,), -1, dtype=torch.int32)
    x, mask = ctypes.c_void_p(pointer(values)), ctypes.c_void_p(pointer(words))
    check(library().driver_mask_pack(x, mask, ctypes.c_int64(numel), DTYPES[dtype]))
    keep = ~(values <= 0)
    if numel:
        assert torch.equal(words, pack_mask(keep.view(1, numel, 1, 1)))
    out = torch.full_like(values, float("nan"))
    to = ctypes.c_void_p(pointer(out))
    check(library().driver_mask_apply(x, mask, to, ctypes.c_int64(numel), DTYPES[dtype]))
    expected = values.where(keep, torch.zeros((), dtype=dtype))
    assert torch.equal(out.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
    check(library().driver_mask_apply(x, mask, x, ctypes.c_int64(numel), DTYPES[dtype]))
    assert torch.equal(values.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0)), "in place"
