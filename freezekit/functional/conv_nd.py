"""Convolutions of one and three dimensions, and transposed ones: a frozen weight keeps no input and runs no wgrad."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freezekit import _C
from freezekit.functional._torch import LEFT_TO_TORCH, SizeN, are_tensors, as_torch, is_integer, padded_to_same, sizes

_conv_nd = torch.ops.freezekit.convolution.default


@as_torch(F.conv1d, _C.quick.conv1d, shortcut=False)
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
    return _convolve(1, input, weight, bias, groups, stride=stride, padding=padding, dilation=dilation)


@as_torch(F.conv3d, _C.quick.conv3d, shortcut=False)
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: SizeN = 1,
    padding: SizeN | str = 0,
    dilation: SizeN = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv3d`, keeping what :func:`conv1d` keeps. Other arguments and errors as there.

    Args:
        input: (N, C, D, H, W), or (C, D, H, W) unbatched.
        weight: (K, C / groups, T, R, S).

    >>> import torch, freezekit as fk
    >>> fk.functional.conv3d(torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)).item()
    8.0
    """
    return _convolve(3, input, weight, bias, groups, stride=stride, padding=padding, dilation=dilation)


@as_torch(F.conv_transpose1d, _C.quick.conv_transpose1d, shortcut=False)
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
    """`torch.nn.functional.conv_transpose1d`, keeping what :func:`conv_transpose2d` keeps. Else as there.

    Args:
        input: (N, C, L), or (C, L) unbatched.
        weight: (C, K / groups, R).

    >>> import torch, freezekit as fk
    >>> fk.functional.conv_transpose1d(torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    tensor([[[1., 2., 1.]]])
    """
    settings = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    return _convolve(1, input, weight, bias, groups, **settings)


@as_torch(F.conv_transpose2d, _C.quick.conv_transpose2d, shortcut=False)
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
    settings = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    return _convolve(2, input, weight, bias, groups, **settings)


@as_torch(F.conv_transpose3d, _C.quick.conv_transpose3d, shortcut=False)
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
    """`torch.nn.functional.conv_transpose3d`, keeping what :func:`conv_transpose2d` keeps. Else as there.

    Args:
        input: (N, C, D, H, W), or (C, D, H, W) unbatched.
        weight: (C, K / groups, T, R, S).

    >>> import torch, freezekit as fk
    >>> fk.functional.conv_transpose3d(torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 2, 2, 2)).sum().item()
    8.0
    """
    settings = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    return _convolve(3, input, weight, bias, groups, **settings)


def _convolve(axes: int, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, **settings: Any) -> Tensor:
    """By freezekit's operator; torch's own says what is wrong, and splits complex numbers."""
    numbers, whole = dict(settings), input
    fits = isinstance(input, Tensor) and isinstance(weight, Tensor) and are_tensors(bias) and is_integer(groups)
    fits = fits and weight.dim() == axes + 2 and input.dim() in (axes + 1, axes + 2) and not input.is_complex()
    if fits and isinstance(settings["padding"], str):
        whole, numbers["padding"] = _resolve_padding(axes, whole, weight, **settings)
    found = {name: sizes(value, axes) for name, value in numbers.items()}
    if not fits or None in found.values():
        return LEFT_TO_TORCH
    transposed, more = "output_padding" in found, found.get("output_padding", (0,) * axes)
    batched = whole if input.dim() == axes + 2 else whole.unsqueeze(0)
    y = _conv_nd(batched, weight, bias, found["stride"], found["padding"], found["dilation"], transposed, more, groups)
    return y if batched is whole else y.squeeze(0)


def _resolve_padding(
    axes: int, input: Tensor, weight: Tensor, *, stride: object, padding: str, dilation: object, **_: object
) -> tuple[Tensor, tuple[int, ...] | None]:
    """String padding as numbers, see `padded_to_same`."""
    if padding == "valid":
        return input, (0,) * axes
    spread = sizes(dilation, axes)
    if padding != "same" or sizes(stride, axes) != (1,) * axes or spread is None:
        return input, None
    return padded_to_same(input, [d * (k - 1) for d, k in zip(spread, weight.shape[2:])])
