"""Smooth activations. Behind a group or layer norm they keep nothing: the norm keeps what their input is made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freezekit import _C
from freezekit.enabling import is_enabled
from freezekit.functional._torch import LEFT_TO_TORCH, as_torch


@as_torch(F.silu)
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


@as_torch(F.gelu)
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


@as_torch(F.hardswish)
def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardswish`; behind a norm it keeps nothing, as :func:`silu`.

    Args:
        input, inplace: as for :func:`silu`.

    >>> import torch, freezekit as fk
    >>> fk.functional.hardswish(torch.tensor([-3.0, 3.0]))
    tensor([-0., 3.])
    """
    return _behind_norm(F.hardswish, input, inplace)


@as_torch(F.mish)
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
    # Compilers have chains of their own, and while enabled torch's operator does the same.
    if not isinstance(input, Tensor) or torch.compiler.is_compiling() or is_enabled():
        return LEFT_TO_TORCH
    return _C.chains.activation(function, input, *rest, **named)
