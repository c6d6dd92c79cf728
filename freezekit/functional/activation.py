"""Activations that are linear in pieces, and dropout: one bit per element is what backward reads of them.

Smooth ones keep nothing behind a group or layer norm: the norm keeps what their input is made from.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freezekit import _C, backends
from freezekit.functional._torch import LEFT_TO_TORCH, are_numbers, as_torch

_activation = torch.ops.freezekit.activation.default
_activation_ = torch.ops.freezekit.activation_.default
_prelu = torch.ops.freezekit.prelu.default
_dropout = torch.ops.freezekit.dropout.default
_dropout_ = torch.ops.freezekit.dropout_.default


@as_torch(F.relu, _C.quick.relu)
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu`, keeping one bit per element instead of its output.

    The gradient at 0 is 0. NaN passes, forward and backward, as in torch.

    Args:
        input: any shape, layout, device and dtype; bits are kept for floating dtypes where a gradient is needed.
        inplace: write the result into `input`.

    >>> import torch, freezekit as fk
    >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    >>> fk.functional.relu(x).sum().backward()
    >>> x.grad
    tensor([0., 0., 1.])
    """
    if not isinstance(input, Tensor):
        return LEFT_TO_TORCH
    return _apply(input, inplace, "relu", 0.0, 0.0)


@as_torch(F.relu6)
def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu6`, min(max(x, 0), 6), keeping one bit per element instead of its input.

    Args:
        input, inplace: as for :func:`relu`.

    >>> import torch, freezekit as fk
    >>> fk.functional.relu6(torch.tensor([-1.0, 3.0, 7.0]))
    tensor([0., 3., 6.])
    """
    return hardtanh(input, 0.0, 6.0, inplace)


@as_torch(F.hardtanh, _C.quick.hardtanh)
def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardtanh`, min(max(x, min_val), max_val), keeping one bit per element instead of its input.

    The gradient is 0 at both ends and beyond.

    Args:
        input, inplace: as for :func:`relu`.
        min_val, max_val: the ends.

    Raises:
        ValueError: if `min_val` is greater than `max_val`.

    >>> import torch, freezekit as fk
    >>> fk.functional.hardtanh(torch.tensor([-3.0, 0.5, 3.0]))
    tensor([-1.0000,  0.5000,  1.0000])
    """
    # Torch's error, and its own way with NaN.
    if not isinstance(input, Tensor) or not are_numbers(min_val, max_val) or not min_val <= max_val:
        return LEFT_TO_TORCH
    return _apply(input, inplace, "hardtanh", float(min_val), float(max_val))


@as_torch(F.leaky_relu, _C.quick.leaky_relu)
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.leaky_relu`, keeping one bit per element instead of its input.

    Args:
        input, inplace: as for :func:`relu`.
        negative_slope: the factor below 0, and at 0. Of a negative one in place torch refuses the gradient.

    >>> import torch, freezekit as fk
    >>> fk.functional.leaky_relu(torch.tensor([-1.0, 2.0]), 0.5)
    tensor([-0.5000,  2.0000])
    """
    if not isinstance(input, Tensor) or not are_numbers(negative_slope) or (inplace and not negative_slope >= 0):
        return LEFT_TO_TORCH
    return _apply(input, inplace, "leaky_relu", float(negative_slope), 0.0)


@as_torch(F.prelu, _C.quick.prelu)
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.prelu`; while the slope is frozen it keeps one bit per element instead of its input.

    The gradient of a slope that learns reads the input: the call is torch's own then, and keeps it.

    Args:
        input: (N, C, ...), as for :func:`relu`.
        weight: the factor below 0, and at 0: (1,) for all, or (C,) for each channel.

    Raises:
        TypeError, RuntimeError: as torch's.

    >>> import torch, freezekit as fk
    >>> fk.functional.prelu(torch.tensor([-1.0, 2.0]), torch.tensor([0.5]))
    tensor([-0.5000,  2.0000])
    """
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        return LEFT_TO_TORCH
    return _prelu(input, weight, backend=backends._current)


@as_torch(F.dropout, _C.quick.dropout)
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout`, keeping one bit per element instead of a mask of the input's dtype.

    It draws from torch's generator by the calls that torch makes: the same seed drops the same elements, and what comes
    after finds the generator in the same state.

    Args:
        input: any shape and floating dtype.
        p: probability of an element to be zeroed; the others are scaled by 1 / (1 - p).
        training: False returns `input` as it is.
        inplace: write the result into `input`.

    Raises:
        ValueError: if `p` is not between 0 and 1.

    >>> import torch, freezekit as fk
    >>> _ = torch.manual_seed(0)
    >>> sorted(set(fk.functional.dropout(torch.ones(100)).tolist()))
    [0.0, 2.0]
    """
    if not isinstance(input, Tensor) or not isinstance(training, bool) or not are_numbers(p) or not 0.0 <= p <= 1.0:
        return LEFT_TO_TORCH
    if not inplace:
        return _dropout(input, float(p), training, backend=backends._current)
    _dropout_(input, float(p), training, backend=backends._current)
    return input


def _apply(input: Tensor, inplace: bool, kind: str, a: float, b: float) -> Tensor:
    if not inplace:
        return _activation(input, kind, a, b, backend=backends._current)
    _activation_(input, kind, a, b, backend=backends._current)
    return input


@as_torch(F.silu, _C.quick.silu)
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu`; it keeps its input, and nothing behind :func:`group_norm` or :func:`layer_norm`.

    The backward pass makes the input again from what the norm keeps, to the bit: see "Chains" in docs/enable.md.

    Args:
        input: any shape, device and dtype. A norm's result is not kept on a CPU, from 8 KiB on.
        inplace: write the result into `input`.

    >>> import torch, freezekit as fk
    >>> fk.functional.silu(torch.zeros(2))
    tensor([0., 0.])
    """
    return _behind_norm(F.silu, input, inplace)


@as_torch(F.gelu, lambda *given: _C.quick.gelu(*given) if len(given) == 1 else None)
def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu`; behind a norm it keeps nothing, as :func:`silu`.

    Args:
        input: as for :func:`silu`.
        approximate: "none" or "tanh".

    >>> import torch, freezekit as fk
    >>> fk.functional.gelu(torch.zeros(2))
    tensor([0., 0.])
    """
    return _behind_norm(F.gelu, input, approximate=approximate)


@as_torch(F.hardswish, _C.quick.hardswish)
def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardswish`; behind a norm it keeps nothing, as :func:`silu`.

    Args:
        input, inplace: as for :func:`silu`.

    >>> import torch, freezekit as fk
    >>> fk.functional.hardswish(torch.tensor([-3.0, 3.0]))
    tensor([-0., 3.])
    """
    return _behind_norm(F.hardswish, input, inplace)


@as_torch(F.mish, _C.quick.mish)
def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.mish`; behind a norm it keeps nothing, as :func:`silu`.

    Args:
        input, inplace: as for :func:`silu`.

    >>> import torch, freezekit as fk
    >>> fk.functional.mish(torch.zeros(2))
    tensor([0., 0.])
    """
    return _behind_norm(F.mish, input, inplace)


def _behind_norm(function: Callable[..., Tensor], input: Tensor, *rest: Any, **named: Any) -> Tensor:
    """torch's own call, whose node keeps a recipe for its input where there is one."""
    # Compilers have chains of their own.
    if not isinstance(input, Tensor) or torch.compiler.is_compiling():
        return LEFT_TO_TORCH
    return _C.chains.activation(function, input, *rest, **named)
