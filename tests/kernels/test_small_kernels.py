"""Filter transform, layout change, mask pack and apply."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from .emulated import DTYPES, KernelError, Problem, check, library, pointer
from .reference import pack_mask

SIZES = [Problem(c=3, k=5), Problem(c=34, k=65, r=1, s=2), Problem(c=12, k=8, groups=4), Problem(c=6, k=6, groups=6)]
SAME = [(dtype, dtype) for dtype in DTYPES]
CASTS = [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]


@dataclass
class Norm:
    """A batch norm to fold in, with the bias before it; gamma, beta and bias may be absent."""

    mean: Tensor | None
    var: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-3

    def fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """filter' and bias' in float64."""
        exact = lambda t, otherwise: otherwise if t is None else t.double()  # noqa: E731
        scale = exact(self.gamma, 1.0) / torch.sqrt(self.var.double() + self.eps)
        shift = exact(self.beta, 0.0) + (exact(self.bias, 0.0) - self.mean.double()) * scale
        return weight.double() * scale[:, None, None, None], shift


def transform(
    problem: Problem, weight: Tensor, to: torch.dtype, transposed: bool, norm: Norm | None = None
) -> tuple[Tensor, Tensor]:
    """The flat result and bias'; weight is (K, C/G, R, S) with any strides."""
    out = torch.full((weight.numel(),), float("nan"), dtype=to)
    bias = torch.full((problem.k,), float("nan"), dtype=accumulator(to))
    parts = None
    if norm is not None:
        parts = (ctypes.c_void_p * 6)(
            *(pointer(t) for t in (norm.mean, norm.var, norm.gamma, norm.beta, norm.bias, bias))
        )
    status = library().driver_filter_transform(
        (ctypes.c_int64 * 16)(*problem.flat),
        DTYPES[weight.dtype],
        DTYPES[to],
        int(transposed),
        (ctypes.c_int64 * 4)(*weight.stride()),
        parts,
        DTYPES[norm.var.dtype] if norm is not None else 0,
        ctypes.c_double(norm.eps if norm is not None else 0),
        ctypes.c_void_p(pointer(weight)),
        ctypes.c_void_p(pointer(out)),
    )
    check(status)
    return out, bias


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_order(filter: Tensor, problem: Problem, transposed: bool) -> Tensor:
    """A (K, C/G, R, S) filter as KRSC or CRSK, flat."""
    k, c, r, s = filter.shape
    grouped = filter.reshape(problem.groups, k // problem.groups, c, r, s)
    return grouped.permute((0, 2, 3, 4, 1) if transposed else (0, 1, 3, 4, 2)).reshape(-1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("source", "to"), SAME + CASTS, ids=str)
def test_filter_transform(
    source: torch.dtype, to: torch.dtype, transposed: bool, memory_format: torch.memory_format
) -> None:
    for problem in SIZES:
        weight = torch.randn(problem.sizes["filter"], dtype=torch.float64).to(source)
        weight = weight.contiguous(memory_format=memory_format)
        actual, _ = transform(problem, weight, to, transposed)
        assert torch.equal(actual, in_order(weight.to(to), problem, transposed)), problem


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("source", "to"), SAME + CASTS, ids=str)
@pytest.mark.parametrize("parts", ["", "gamma beta", "bias", "gamma beta bias"])
@pytest.mark.parametrize("statistics", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_batch_norm_is_folded_in_float64(
    source: torch.dtype, to: torch.dtype, transposed: bool, parts: str, statistics: torch.dtype
) -> None:
    for problem in SIZES:
        make = lambda: torch.randn(problem.k, dtype=torch.float64).to(statistics)  # noqa: B023, E731
        weight = torch.randn(problem.sizes["filter"], dtype=torch.float64).to(source)
        norm = Norm(make(), torch.rand(problem.k).to(statistics), **{name: make() for name in parts.split()})
        actual, bias = transform(problem, weight, to, transposed, norm)
        filter, shift = norm.fold(weight)
        # One rounding each, of a float64 that is right but for its own last bits.
        for mine, exact in ((actual, in_order(filter, problem, transposed)), (bias, shift)):
            torch.testing.assert_close(mine.double(), exact, rtol=torch.finfo(mine.dtype).eps, atol=1e-15)
        assert bias.dtype == accumulator(to)


def test_what_a_filter_transform_cannot_do_is_refused() -> None:
    weight = torch.ones(SIZES[0].sizes["filter"])
    with pytest.raises(KernelError, match="unsupported"):
        transform(SIZES[0], weight, torch.float64, False)
    with pytest.raises(KernelError, match="invalid_argument"):
        transform(SIZES[0], weight, torch.float32, False, Norm(None, torch.ones(5)))


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
