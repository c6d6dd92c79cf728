"""Convolutions of one and three dimensions, and transposed ones: a frozen weight keeps no input and runs no wgrad."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from freezekit.functional._torch import as_torch

SizeN = int | Sequence[int]

_convolution = torch.ops.freezekit.convolution.default


@as_torch(F.conv1d, shortcut=False)
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: SizeN = 1,
    padding: SizeN | str = 0,
    dilation: SizeN = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv1d`, keeping and computing only what the gradients asked for need.

    Args:
        input: (N, C, L), or (C, L) unbatched.
        weight: (K, C / groups, R).
        bias, stride, padding, dilation, groups: as in torch, string padding too.

    Raises:
        RuntimeError, TypeError: as torch's.

    >>> import torch, freezekit as fk
    >>> fk.functional.conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 2))
    tensor([[[2., 2., 2.]]])
    """
    if has_torch_function_variadic(input, weight, bias):
        arguments = (input, weight, bias, stride, padding, dilation, groups)
        return handle_torch_function(conv1d, (input, weight, bias), *arguments)
    return _forward(1, F.conv1d, input, weight, bias, stride, padding, dilation, groups)


@as_torch(F.conv3d, shortcut=False)
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: SizeN = 1,
    padding: SizeN | str = 0,
    dilation: SizeN = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv3d`, keeping and computing only what the gradients asked for need.

    Args:
        input: (N, C, D, H, W), or (C, D, H, W) unbatched.
        weight: (K, C / groups, T, R, S).
        bias, stride, padding, dilation, groups: as in torch, string padding too.

    Raises:
        RuntimeError, TypeError: as torch's.

    >>> import torch, freezekit as fk
    >>> fk.functional.conv3d(torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)).item()
    8.0
    """
    if has_torch_function_variadic(input, weight, bias):
        arguments = (input, weight, bias, stride, padding, dilation, groups)
        return handle_torch_function(conv3d, (input, weight, bias), *arguments)
    return _forward(3, F.conv3d, input, weight, bias, stride, padding, dilation, groups)


@as_torch(F.conv_transpose1d, shortcut=False)
def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: SizeN = 1,
    padding: SizeN = 0,
    output_padding: SizeN = 0,
    groups: int = 1,
    dilation: SizeN = 1,
) -> Tensor:
    """`torch.nn.functional.conv_transpose1d`, keeping and computing only what the gradients asked for need.

    Args:
        input: (N, C, L), or (C, L) unbatched.
        weight: (C, K / groups, R).
        bias, stride, padding, output_padding, groups, dilation: as in torch.

    Raises:
        RuntimeError, TypeError: as torch's.

    >>> import torch, freezekit as fk
    >>> fk.functional.conv_transpose1d(torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    tensor([[[1., 2., 1.]]])
    """
    settings = (stride, padding, output_padding, groups, dilation)
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(conv_transpose1d, (input, weight, bias), input, weight, bias, *settings)
    return _transposed(1, F.conv_transpose1d, input, weight, bias, *settings)


@as_torch(F.conv_transpose2d, shortcut=False)
def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: SizeN = 1,
    padding: SizeN = 0,
    output_padding: SizeN = 0,
    groups: int = 1,
    dilation: SizeN = 1,
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d`, keeping and computing only what the gradients asked for need.

    Args:
        input: (N, C, H, W), or (C, H, W) unbatched.
        weight: (C, K / groups, R, S).
        bias, stride, padding, output_padding, groups, dilation: as in torch.

    Raises:
        RuntimeError, TypeError: as torch's.

    >>> import torch, freezekit as fk
    >>> fk.functional.conv_transpose2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), stride=2).shape
    torch.Size([1, 1, 4, 4])
    """
    settings = (stride, padding, output_padding, groups, dilation)
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(conv_transpose2d, (input, weight, bias), input, weight, bias, *settings)
    return _transposed(2, F.conv_transpose2d, input, weight, bias, *settings)


@as_torch(F.conv_transpose3d, shortcut=False)
def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: SizeN = 1,
    padding: SizeN = 0,
    output_padding: SizeN = 0,
    groups: int = 1,
    dilation: SizeN = 1,
) -> Tensor:
    """`torch.nn.functional.conv_transpose3d`, keeping and computing only what the gradients asked for need.

    Args:
        input: (N, C, D, H, W), or (C, D, H, W) unbatched.
        weight: (C, K / groups, T, R, S).
        bias, stride, padding, output_padding, groups, dilation: as in torch.

    Raises:
        RuntimeError, TypeError: as torch's.

    >>> import torch, freezekit as fk
    >>> fk.functional.conv_transpose3d(torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 2, 2, 2)).sum().item()
    8.0
    """
    settings = (stride, padding, output_padding, groups, dilation)
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(conv_transpose3d, (input, weight, bias), input, weight, bias, *settings)
    return _transposed(3, F.conv_transpose3d, input, weight, bias, *settings)


def _ints(value: SizeN, count: int) -> tuple[int, ...] | None:
    """One number for each of `count` axes; None where that cannot be said."""
    if isinstance(value, int):
        return (value,) * count
    found = tuple(value)
    return found * count if len(found) == 1 else found if len(found) == count else None


def _is_torch_s(axes: int, input: Tensor, weight: Tensor) -> bool:
    """Whether torch's own function has to take the call: for its error, or for complex numbers, which it splits."""
    return weight.dim() != axes + 2 or input.dim() not in (axes + 1, axes + 2) or input.is_complex()


def _forward(
    axes: int,
    torch_s: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: SizeN,
    padding: SizeN | str,
    dilation: SizeN,
    groups: int,
) -> Tensor:
    if _is_torch_s(axes, input, weight):
        return torch_s(input, weight, bias, stride, padding, dilation, groups)
    step, spread = _ints(stride, axes), _ints(dilation, axes)
    edge, whole = None, input
    if padding == "valid":
        edge = (0,) * axes
    elif padding == "same" and step == (1,) * axes and spread is not None:
        total = [d * (k - 1) for d, k in zip(spread, weight.shape[2:])]
        edge = tuple(t // 2 for t in total)
        if any(t % 2 for t in total):  # one element more at the end
            whole = F.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
    elif not isinstance(padding, str):
        edge = _ints(padding, axes)
    if step is None or spread is None or edge is None:
        return torch_s(input, weight, bias, stride, padding, dilation, groups)
    if input.dim() == axes + 1:
        return _convolution(whole.unsqueeze(0), weight, bias, step, edge, spread, False, (0,) * axes, groups).squeeze(0)
    return _convolution(whole, weight, bias, step, edge, spread, False, (0,) * axes, groups)


def _transposed(
    axes: int,
    torch_s: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: SizeN,
    padding: SizeN,
    output_padding: SizeN,
    groups: int,
    dilation: SizeN,
) -> Tensor:
    step, edge, spread = _ints(stride, axes), _ints(padding, axes), _ints(dilation, axes)
    more = _ints(output_padding, axes)
    if step is None or edge is None or spread is None or more is None or _is_torch_s(axes, input, weight):
        return torch_s(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if input.dim() == axes + 1:
        return _convolution(input.unsqueeze(0), weight, bias, step, edge, spread, True, more, groups).squeeze(0)
    return _convolution(input, weight, bias, step, edge, spread, True, more, groups)
