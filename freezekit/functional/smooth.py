"""Smooth activations: behind a group or layer norm they keep nothing, since the norm keeps what they are made from."""

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
    """`torch.nn.functional.silu`; behind :func:`group_norm` it keeps nothing, and elsewhere its input.

    The backward pass makes the input again from what the norm keeps, to the bit: see "Chains" in docs/enable.md.

    Args:
        input: any shape, device and dtype. It is what :func:`group_norm` returned that is not kept, on a CPU and in
            float32 or float64.
        inplace: write the result into `input`.

    >>> import torch, freezekit as fk
    >>> fk.functional.silu(torch.zeros(2))
    tensor([0., 0.])
    """
    return _behind_norm(F.silu, input, inplace)


@as_torch(F.gelu)
def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu`; behind :func:`group_norm` it keeps nothing, and elsewhere its input.

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
    """`torch.nn.functional.hardswish`; behind :func:`group_norm` it keeps nothing, and elsewhere its input.

    Args:
        input, inplace: as for :func:`silu`.

    >>> import torch, freezekit as fk
    >>> fk.functional.hardswish(torch.tensor([-3.0, 3.0]))
    tensor([-0., 3.])
    """
    return _behind_norm(F.hardswish, input, inplace)


@as_torch(F.mish)
def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.mish`; behind :func:`group_norm` it keeps nothing, and elsewhere its input.

    Args:
        input, inplace: as for :func:`silu`.

    >>> import torch, freezekit as fk
    >>> fk.functional.mish(torch.zeros(2))
    tensor([0., 0.])
    """
    return _behind_norm(F.mish, input, inplace)


def _behind_norm(torch_s: Callable[..., Tensor], input: Tensor, *rest: Any, **named: Any) -> Tensor:
    """torch's own call, whose node keeps a recipe for its input where there is one."""
    # Compilers have chains of their own, and while enabled torch's operator does the same.
    if not isinstance(input, Tensor) or torch.compiler.is_compiling() or is_enabled():
        return LEFT_TO_TORCH
    return _C.chains.activation(torch_s, input, *rest, **named)
