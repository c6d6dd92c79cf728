"""What the kernels must give: float64 convolutions by ATen, epilogues in plain torch, masks by numpy's bit packing."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .emulated import Epilogue, Problem, nhwc


def operands(
    operator: str, problem: Problem, dtype: torch.dtype, integers: bool, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The two tensors that the operator reads. Integers are small enough for every sum to be exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    names = {"fprop": ("x", "filter"), "dgrad": ("y", "filter"), "wgrad": ("y", "x")}[operator]

    def make(size: tuple[int, ...]) -> Tensor:
        if integers:
            return torch.randint(-2, 3, size, generator=generator).to(dtype)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    return make(problem.sizes[names[0]]), make(problem.sizes[names[1]])


def conv2d(operator: str, problem: Problem, first: Tensor, second: Tensor) -> Tensor:
    """The operator in float64."""
    first, second = first.double(), second.double()
    settings = (problem.stride, problem.pad, problem.dilation, problem.groups)
    if operator == "fprop":
        return F.conv2d(first, second, None, *settings)
    if operator == "dgrad":
        if problem.n == 0:
            return first.new_zeros(problem.sizes["x"])
        return conv2d_input(problem.sizes["x"], second, first, *settings)
    if problem.n == 0:
        return first.new_zeros(problem.sizes["filter"])
    return conv2d_weight(second, problem.sizes["filter"], first, *settings)


def reduction_length(operator: str, problem: Problem) -> int:
    """Terms of the longest sum."""
    taps = problem.r * problem.s
    return {
        "fprop": problem.c // problem.groups * taps,
        "dgrad": problem.k // problem.groups * taps,
        "wgrad": problem.n * problem.p * problem.q,
    }[operator]


def pack_mask(keep: Tensor) -> Tensor:
    """A bool (N, C, H, W) tensor as int32 words of 32 bits in NHWC order, the last one padded with zeros."""
    bits = nhwc(keep.to(torch.float32)).permute(0, 2, 3, 1).reshape(-1).numpy().astype(np.uint8)
    packed = np.packbits(np.pad(bits, (0, -len(bits) % 32)), bitorder="little")
    return torch.from_numpy(packed.view(np.int32).copy())


def finish(value: Tensor, epilogue: Epilogue, keep_in: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The output in float64 and the bits (N, C, H, W) of mask_out. keep_in is the bool tensor behind mask_in."""
    if epilogue.scale is not None:
        value = value * epilogue.scale.double()[:, None, None]
    if epilogue.bias is not None:
        value = value + epilogue.bias.double()[:, None, None]
    if epilogue.residual is not None:
        value = value + epilogue.residual.double()
    rounded = value.to(dtype)
    keep = (rounded > 0) & (rounded < epilogue.relu_end)
    if epilogue.relu:
        value = value.clamp(0.0, epilogue.relu_end)
    if keep_in is not None:
        value = value.where(keep_in, 0.0)
    return value, keep


def assert_close(actual: Tensor, expected: Tensor, terms: int, dtype: torch.dtype) -> None:
    """For sums of products of standard normals. The output is rounded once, to `dtype`. A running sum of `terms` terms
    has partial sums of size sqrt(i), each rounded to the accumulator, which adds up to a standard deviation of at most
    terms / sqrt(8) times its epsilon; the bound is beyond five of them."""
    assert torch.isfinite(actual.double()).all(), "an output was not written"
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    bound = torch.finfo(dtype).eps * expected.abs() + 2 * torch.finfo(accumulator).eps * terms
    excess = ((actual.double() - expected).abs() - bound).max().item() if actual.numel() else 0.0
    assert excess <= 0, f"error exceeds its bound by {excess:.3g}"
