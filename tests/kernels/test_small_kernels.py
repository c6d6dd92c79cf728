"""Filter transform, layout change, mask pack and apply."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from .emulated import DTYPES, KernelError, Problem, check, library, pointer

SIZES = [Problem(c=3, k=5), Problem(c=34, k=65, r=1, s=2), Problem(c=12, k=8, groups=4), Problem(c=6, k=6, groups=6)]
SAME = [(dtype, dtype) for dtype in DTYPES]
CASTS = [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]


@dataclass
class Norm:
    """A batch norm with fixed statistics and the bias before it; all but var may be absent."""

    var: Tensor
    mean: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-3

    def affine(self) -> tuple[Tensor, Tensor]:
        """scale and shift in float64."""
        exact = lambda t, otherwise: otherwise if t is None else t.double()  # noqa: E731
        scale = exact(self.gamma, 1.0) / torch.sqrt(self.var.double() + self.eps)
        return scale, exact(self.beta, 0.0) + (exact(self.bias, 0.0) - exact(self.mean, 0.0)) * scale


def transform(
    problem: Problem, weight: Tensor, to: torch.dtype, transposed: bool, scale: Tensor | None = None
) -> Tensor:
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
        actual = transform(problem, weight, to, transposed)
        assert torch.equal(actual, in_order(weight.to(to), problem, transposed)), problem


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("source", "to"), SAME + CASTS, ids=str)
def test_a_filter_is_scaled_and_rounded_once(source: torch.dtype, to: torch.dtype, transposed: bool) -> None:
    for problem in SIZES:
        weight = torch.randn(problem.sizes["filter"], dtype=torch.float64).to(source)
        scale = torch.randn(problem.k, dtype=accumulator(source))
        wide = weight.to(scale.dtype) * scale[:, None, None, None]
        actual = transform(problem, weight, to, transposed, scale)
        assert torch.equal(actual, in_order(wide.to(to), problem, transposed)), problem


def affine(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale and shift by the kernel, for tensors of a dtype."""
    channels = norm.var.numel()
    made = tuple(torch.full((channels,), float("nan"), dtype=accumulator(dtype)) for _ in range(2))
    parts = (norm.mean, norm.var, norm.gamma, norm.beta, norm.bias)
    check(
        library().driver_norm_affine(
            (ctypes.c_void_p * 5)(*(pointer(t) for t in parts)),
            DTYPES[norm.var.dtype],
            ctypes.c_double(norm.eps),
            ctypes.c_int64(channels),
            DTYPES[dtype],
            *(ctypes.c_void_p(pointer(t)) for t in made),
        )
    )
    return made


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("parts", ["", "mean", "mean gamma beta", "mean bias", "mean gamma beta bias"])
@pytest.mark.parametrize("statistics", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_is_a_scale_and_a_shift(dtype: torch.dtype, parts: str, statistics: torch.dtype) -> None:
    for channels in (1, 5, 128, 300):
        make = lambda: torch.randn(channels, dtype=torch.float64).to(statistics)  # noqa: B023, E731
        norm = Norm(torch.rand(channels).to(statistics), **{name: make() for name in parts.split()})
        for mine, exact in zip(affine(norm, dtype), norm.affine(), strict=True):
            # One rounding each, of a float64 that is right but for its own last bits.
            torch.testing.assert_close(mine.double(), exact, rtol=torch.finfo(mine.dtype).eps, atol=1e-15)


def test_what_a_filter_transform_cannot_do_is_refused() -> None:
    weight = torch.ones(SIZES[0].sizes["filter"])
    with pytest.raises(KernelError, match="unsupported"):
        transform(SIZES[0], weight, torch.float64, False)
