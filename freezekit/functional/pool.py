"""Pooling and padding: max pooling keeps a byte an output element, what is linear in its input keeps sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from freezekit import backends
from freezekit.functional._torch import as_torch

# torch's own functions, which give torch's own errors: their types know fewer sequences than they take.
F: Any = torch.nn.functional

SizeN = int | Sequence[int]
MaybeSizeN = int | Sequence[int | None] | None

_max_pool2d = torch.ops.freezekit.max_pool2d.default
_max_pool2d_with_indices = torch.ops.freezekit.max_pool2d_with_indices.default
_avg_pool = torch.ops.freezekit.avg_pool.default
_adaptive_avg_pool = torch.ops.freezekit.adaptive_avg_pool.default
_PADS = {
    "reflect": torch.ops.freezekit.reflection_pad.default,
    "replicate": torch.ops.freezekit.replication_pad.default,
}


@as_torch(F.max_pool2d)
def max_pool2d(
    input: Tensor,
    kernel_size: SizeN,
    stride: SizeN | None = None,
    padding: SizeN = 0,
    dilation: SizeN = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`torch.nn.functional.max_pool2d`, keeping each output's place in its window instead of input and int64 indices.

    That is one byte an output element for windows of up to 256, two for larger ones.

    Args:
        input: (N, C, H, W), or (C, H, W) unbatched.
        kernel_size, stride, padding, dilation: one number, or (height, width); stride defaults to kernel_size.
        ceil_mode: let the last window begin inside the input and end outside.
        return_indices: also return int64 places h * W + w, which the caller then keeps.

    Returns:
        (N, C, P, Q), or that and the indices.

    Raises:
        RuntimeError: as torch's.

    >>> import torch, freezekit as fk
    >>> x = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
    >>> fk.functional.max_pool2d(x, 2).sum().backward()
    >>> x.grad[0, 0]
    tensor([[0., 0., 0., 0.],
            [0., 1., 0., 1.],
            [0., 0., 0., 0.],
            [0., 1., 0., 1.]])
    """
    settings = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if has_torch_function_unary(input):
        return handle_torch_function(max_pool2d, (input,), input, *settings)
    if input.dim() != 4:
        if input.dim() != 3:
            return F.max_pool2d(input, *settings)
        result = max_pool2d(input.unsqueeze(0), *settings)
        return result.squeeze(0) if isinstance(result, Tensor) else (result[0].squeeze(0), result[1].squeeze(0))
    op = _max_pool2d_with_indices if return_indices else _max_pool2d
    sizes = [_pair(size) for size in (kernel_size, [] if stride is None else stride, padding, dilation)]
    return op(input, *sizes, ceil_mode, backend=backends._current)


@as_torch(F.avg_pool1d)
def avg_pool1d(
    input: Tensor,
    kernel_size: SizeN,
    stride: SizeN | None = None,
    padding: SizeN = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """`torch.nn.functional.avg_pool1d`, keeping sizes alone. Arguments as there.

    >>> import torch, freezekit as fk
    >>> fk.functional.avg_pool1d(torch.tensor([[[1.0, 3.0, 5.0]]]), 2, 1)
    tensor([[[2., 4.]]])
    """
    if has_torch_function_unary(input):
        arguments = (input, kernel_size, stride, padding, ceil_mode, count_include_pad)
        return handle_torch_function(avg_pool1d, (input,), *arguments)
    window, step, edge = _ints(kernel_size, 1), _ints(_step(stride, kernel_size), 1), _ints(padding, 1)
    if input.dim() not in (2, 3) or {len(window), len(step), len(edge)} != {1}:
        return F.avg_pool1d(input, window, stride, padding, ceil_mode, count_include_pad)
    return _avg_pool(input.unsqueeze(-2), (1, *window), (1, *step), (0, *edge), ceil_mode, count_include_pad).squeeze(
        -2
    )


@as_torch(F.avg_pool2d)
def avg_pool2d(
    input: Tensor,
    kernel_size: SizeN,
    stride: SizeN | None = None,
    padding: SizeN = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`torch.nn.functional.avg_pool2d`, keeping sizes alone. Arguments as there.

    >>> import torch, freezekit as fk
    >>> fk.functional.avg_pool2d(torch.ones(1, 1, 2, 2), 2, divisor_override=1)
    tensor([[[[4.]]]])
    """
    arguments = (input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if has_torch_function_unary(input):
        return handle_torch_function(avg_pool2d, (input,), *arguments)
    return _avg_pool_nd(2, *arguments)


@as_torch(F.avg_pool3d)
def avg_pool3d(
    input: Tensor,
    kernel_size: SizeN,
    stride: SizeN | None = None,
    padding: SizeN = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`torch.nn.functional.avg_pool3d`, keeping sizes alone. Arguments as there.

    >>> import torch, freezekit as fk
    >>> fk.functional.avg_pool3d(torch.ones(1, 2, 2, 2), 2)
    tensor([[[[1.]]]])
    """
    arguments = (input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if has_torch_function_unary(input):
        return handle_torch_function(avg_pool3d, (input,), *arguments)
    return _avg_pool_nd(3, *arguments)


@as_torch(F.adaptive_avg_pool1d)
def adaptive_avg_pool1d(input: Tensor, output_size: SizeN) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool1d`, keeping sizes alone.

    >>> import torch, freezekit as fk
    >>> fk.functional.adaptive_avg_pool1d(torch.tensor([[[1.0, 3.0, 5.0, 7.0]]]), 2)
    tensor([[[2., 6.]]])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(adaptive_avg_pool1d, (input,), input, output_size)
    if input.dim() not in (2, 3):
        return F.adaptive_avg_pool1d(input, output_size)
    return _adaptive_avg_pool(input.unsqueeze(-2), [1, *_ints(output_size, 1)]).squeeze(-2)


@as_torch(F.adaptive_avg_pool2d)
def adaptive_avg_pool2d(input: Tensor, output_size: MaybeSizeN) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`, keeping sizes alone. None in `output_size` keeps the input's size.

    >>> import torch, freezekit as fk
    >>> fk.functional.adaptive_avg_pool2d(torch.ones(1, 4, 6), (2, None)).shape
    torch.Size([1, 2, 6])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(adaptive_avg_pool2d, (input,), input, output_size)
    return _adaptive_avg_pool_nd(2, input, output_size)


@as_torch(F.adaptive_avg_pool3d)
def adaptive_avg_pool3d(input: Tensor, output_size: MaybeSizeN) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool3d`, keeping sizes alone. None in `output_size` keeps the input's size.

    >>> import torch, freezekit as fk
    >>> fk.functional.adaptive_avg_pool3d(torch.ones(1, 4, 6, 6), 2).shape
    torch.Size([1, 2, 2, 2])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(adaptive_avg_pool3d, (input,), input, output_size)
    return _adaptive_avg_pool_nd(3, input, output_size)


@as_torch(F.pad)
def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """`torch.nn.functional.pad`; reflection and replication keep sizes instead of the input. Arguments as there.

    >>> import torch, freezekit as fk
    >>> fk.functional.pad(torch.tensor([[1.0, 2.0, 3.0]]), (1, 1), "reflect")
    tensor([[2., 1., 2., 3., 2.]])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(globals()["pad"], (input,), input, pad, mode=mode, value=value)
    axes = len(pad) // 2
    fits = mode in _PADS and value is None and len(pad) in (2, 4, 6) and input.dim() in (axes + 1, axes + 2)
    # torch has a slower gradient of its own for deterministic replication on a GPU.
    if not fits or (mode == "replicate" and input.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return F.pad(input, list(pad), mode, value)
    return _PADS[mode](input, pad)


def _pair(value: SizeN) -> Sequence[int]:
    """As operators take it: torch's lists of symbols are no single numbers."""
    return value if isinstance(value, tuple | list) else (value, value)


def _ints(value: SizeN, count: int) -> tuple[int, ...]:
    """One number for each of `count` axes."""
    if isinstance(value, int):
        return (value,) * count
    return tuple(value) * (count if len(value) == 1 else 1)


def _step(stride: SizeN | None, kernel_size: SizeN) -> SizeN:
    """As in torch, windows lie side by side where no stride is given, or an empty one."""
    return kernel_size if stride is None or (isinstance(stride, Sequence) and not stride) else stride


def _avg_pool_nd(
    axes: int, input: Tensor, kernel_size: SizeN, stride: SizeN | None, padding: SizeN, *rest: object
) -> Tensor:
    kernel, step, edge = _ints(kernel_size, axes), _ints(_step(stride, kernel_size), axes), _ints(padding, axes)
    if {len(kernel), len(step), len(edge)} != {axes}:
        torch_s = F.avg_pool2d if axes == 2 else F.avg_pool3d
        return torch_s(input, kernel_size, stride, padding, *rest)
    return _avg_pool(input, kernel, step, edge, *rest)


def _adaptive_avg_pool_nd(axes: int, input: Tensor, output_size: MaybeSizeN) -> Tensor:
    wanted = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,) * axes
    if output_size is None or len(wanted) != axes or input.dim() <= axes or set(wanted) == {1}:  # errors, and means
        torch_s = F.adaptive_avg_pool2d if axes == 2 else F.adaptive_avg_pool3d
        return torch_s(input, output_size)
    return _adaptive_avg_pool(input, [own if new is None else new for own, new in zip(input.shape[-axes:], wanted)])
