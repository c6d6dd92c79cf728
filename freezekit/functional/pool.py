"""Pooling and padding: max pooling keeps a byte per output element, what is linear in its input keeps sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional
from torch import Tensor

from freezekit import _C, backends
from freezekit.functional._torch import LEFT_TO_TORCH, SizeN, as_torch, is_integer, sizes

# torch's own functions, which give torch's own errors: their types know fewer sequences than they take.
F: Any = torch.nn.functional

MaybeSizeN = int | Sequence[int | None] | None

_max_pool2d = torch.ops.freezekit.max_pool2d.default
_max_pool2d_with_indices = torch.ops.freezekit.max_pool2d_with_indices.default
_max_pool3d = torch.ops.freezekit.max_pool3d.default
_max_pool3d_with_indices = torch.ops.freezekit.max_pool3d_with_indices.default
_avg_pool = torch.ops.freezekit.avg_pool.default
_adaptive_avg_pool = torch.ops.freezekit.adaptive_avg_pool.default
_PADS = {
    "reflect": torch.ops.freezekit.reflection_pad.default,
    "replicate": torch.ops.freezekit.replication_pad.default,
}


@as_torch(F.max_pool1d, _C.quick.max_pool1d)
def max_pool1d(
    input: Tensor,
    kernel_size: SizeN,
    stride: SizeN | None = None,
    padding: SizeN = 0,
    dilation: SizeN = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`torch.nn.functional.max_pool1d`, keeping what :func:`max_pool2d` keeps. Arguments as there.

    >>> import torch, freezekit as fk
    >>> fk.functional.max_pool1d(torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]), 2)
    tensor([[[3., 2.]]])
    """
    return _maximum(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@as_torch(F.max_pool2d, _C.quick.max_pool2d)
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

    That is one byte per output element for windows of up to 256, two for larger ones.

    Args:
        input: (N, C, H, W), or (C, H, W) unbatched.
        kernel_size, stride, padding, dilation: one number, or (height, width); stride defaults to kernel_size.
        ceil_mode: let the last window begin inside the input and end outside.
        return_indices: also return int64 places h * W + w, which the caller then keeps. On a GPU under backend
            ``"auto"`` the call is then torch's own.

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
    return _maximum(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@as_torch(F.max_pool3d, _C.quick.max_pool3d)
def max_pool3d(
    input: Tensor,
    kernel_size: SizeN,
    stride: SizeN | None = None,
    padding: SizeN = 0,
    dilation: SizeN = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`torch.nn.functional.max_pool3d`, keeping what :func:`max_pool2d` keeps. Arguments as there.

    No backend changes what computes it.

    >>> import torch, freezekit as fk
    >>> fk.functional.max_pool3d(torch.arange(8.0).view(1, 1, 2, 2, 2), 2).item()
    7.0
    """
    return _maximum(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@as_torch(F.avg_pool1d, _C.quick.avg_pool1d)
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
    return _average(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


@as_torch(F.avg_pool2d, _C.quick.avg_pool2d)
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
    return _average(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


@as_torch(F.avg_pool3d, _C.quick.avg_pool3d)
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
    return _average(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


@as_torch(F.adaptive_avg_pool1d, _C.quick.adaptive_avg_pool1d)
def adaptive_avg_pool1d(input: Tensor, output_size: SizeN) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool1d`, keeping sizes alone.

    >>> import torch, freezekit as fk
    >>> fk.functional.adaptive_avg_pool1d(torch.tensor([[[1.0, 3.0, 5.0, 7.0]]]), 2)
    tensor([[[2., 6.]]])
    """
    return _adaptive_average(1, input, output_size)


@as_torch(F.adaptive_avg_pool2d, _C.quick.adaptive_avg_pool2d)
def adaptive_avg_pool2d(input: Tensor, output_size: MaybeSizeN) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`, keeping sizes alone. None in `output_size` keeps the input's size.

    >>> import torch, freezekit as fk
    >>> fk.functional.adaptive_avg_pool2d(torch.ones(1, 4, 6), (2, None)).shape
    torch.Size([1, 2, 6])
    """
    return _adaptive_average(2, input, output_size)


@as_torch(F.adaptive_avg_pool3d, _C.quick.adaptive_avg_pool3d)
def adaptive_avg_pool3d(input: Tensor, output_size: MaybeSizeN) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool3d`, keeping sizes alone. None in `output_size` keeps the input's size.

    >>> import torch, freezekit as fk
    >>> fk.functional.adaptive_avg_pool3d(torch.ones(1, 4, 6, 6), 2).shape
    torch.Size([1, 2, 2, 2])
    """
    return _adaptive_average(3, input, output_size)


@as_torch(F.pad, _C.quick.pad)
def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """`torch.nn.functional.pad`; reflection and replication keep sizes instead of the input. Arguments as there.

    >>> import torch, freezekit as fk
    >>> fk.functional.pad(torch.tensor([[1.0, 2.0, 3.0]]), (1, 1), "reflect")
    tensor([[2., 1., 2., 3., 2.]])
    """
    axes = len(pad) // 2 if isinstance(pad, Sequence) else 0
    fits = isinstance(input, Tensor) and mode in _PADS and value is None and input.dim() in (axes + 1, axes + 2)
    fits = fits and len(pad) in (2, 4, 6) and all(map(is_integer, pad))
    # torch has a slower gradient of its own for deterministic replication on a GPU.
    if not fits or (mode == "replicate" and input.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return LEFT_TO_TORCH
    return _PADS[mode](input, pad)


def _windows(
    axes: int, input: object, kernel_size: object, stride: object, padding: object, dilation: object = 1
) -> tuple[tuple[int, ...], ...] | None:
    """Kernel, stride, padding and dilation, one number for each of `axes`; None where the call is torch's."""
    kernel = sizes(kernel_size, axes)
    # As in torch, windows are side by side where no stride is given, or an empty one.
    default = stride is None or (isinstance(stride, tuple | list) and not stride)
    found = (kernel, kernel if default else sizes(stride, axes), sizes(padding, axes), sizes(dilation, axes))
    if None in found or not isinstance(input, Tensor) or input.dim() not in (axes + 1, axes + 2):
        return None
    return cast(tuple[tuple[int, ...], ...], found)


def _maximum(
    axes: int,
    input: Tensor,
    kernel_size: SizeN,
    stride: SizeN | None,
    padding: SizeN,
    dilation: SizeN,
    ceil_mode: bool,
    return_indices: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    windows = _windows(axes, input, kernel_size, stride, padding, dilation)
    if windows is None or not isinstance(ceil_mode, bool):
        return LEFT_TO_TORCH
    if axes == 3:
        return (_max_pool3d_with_indices if return_indices else _max_pool3d)(input, *windows, ceil_mode)
    batched = input if input.dim() == axes + 2 else input.unsqueeze(0)
    if axes == 1:  # a row of an image
        batched = batched.unsqueeze(-2)
        windows = tuple((neutral, *own) for neutral, own in zip((1, 1, 0, 1), windows))
    op = _max_pool2d_with_indices if return_indices else _max_pool2d
    result: Any = op(batched, *windows, ceil_mode, backend=backends._current)

    def unfold(tensor: Tensor) -> Tensor:
        tensor = tensor.squeeze(-2) if axes == 1 else tensor
        return tensor if input.dim() == axes + 2 else tensor.squeeze(0)

    return (unfold(result[0]), unfold(result[1])) if return_indices else unfold(result)


def _average(
    axes: int,
    input: Tensor,
    kernel_size: SizeN,
    stride: SizeN | None,
    padding: SizeN,
    ceil_mode: bool,
    count_include_pad: bool,
    *divisor: int | None,
) -> Tensor:
    windows = _windows(axes, input, kernel_size, stride, padding)
    flags = isinstance(ceil_mode, bool) and isinstance(count_include_pad, bool)
    if windows is None or not flags or not all(d is None or is_integer(d) for d in divisor):
        return LEFT_TO_TORCH
    kernel, step, edge, _ = windows
    if axes > 1:
        return _avg_pool(input, kernel, step, edge, ceil_mode, count_include_pad, *divisor)
    row = _avg_pool(input.unsqueeze(-2), (1, *kernel), (1, *step), (0, *edge), ceil_mode, count_include_pad)
    return row.squeeze(-2)


def _adaptive_average(axes: int, input: Tensor, output_size: MaybeSizeN) -> Tensor:
    wanted = tuple(output_size) if isinstance(output_size, tuple | list) else (output_size,) * axes
    fits = isinstance(input, Tensor) and input.dim() in (axes + 1, axes + 2) and len(wanted) == axes
    # Means are torch's, and so is None in one dimension, where it means nothing.
    if not fits or set(wanted) == {1} or not all(n is None or is_integer(n) for n in wanted) or output_size is None:
        return LEFT_TO_TORCH
    whole = [own if new is None else new for own, new in zip(input.shape[-axes:], wanted)]
    if axes > 1:
        return _adaptive_avg_pool(input, whole)
    return _adaptive_avg_pool(input.unsqueeze(-2), [1, *whole]).squeeze(-2)
