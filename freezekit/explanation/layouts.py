"""Strides that results have with data, where torch gives them others without.

They decide which kernel attention takes, and what ``contiguous`` and ``reshape`` copy: of one image, the second of two
attentions kept 12 times what was told of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

_VIEWS = (aten.view, aten._unsafe_view)
# What a CPU's kernels write in a memory format, whatever the strides of their input.
_IN_A_FORMAT = (
    *(aten.native_batch_norm, aten.native_group_norm, aten.native_layer_norm),
    *(aten.channel_shuffle, aten.roll),
)
# Of a tensor and a number torch's quick rule takes the memory format, where the kernels keep the strides as they are.
_WITH_NUMBERS = (aten.add, aten.sub, aten.mul, aten.div)
_FORMATS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def lay_out(func: Any, args: Any, result: Any) -> Any:
    """The result of an operator on tensors without data, with the strides that it has with data."""
    kind = func.overloadpacket
    if kind in _VIEWS:
        return _with_strides(result, _strides_of_view(func, args))
    if kind in _WITH_NUMBERS and not any(isinstance(other, Tensor) and other.dim() for other in args[1:]):
        kept = torch.contiguous_format if args[0].is_contiguous() else torch.preserve_format
        return _with_strides(result, _strides_in(kept, args[0]))
    if kind in _IN_A_FORMAT and args[0].device.type == "cpu":
        first, *rest = result if isinstance(result, tuple) else (result,)
        first = _with_strides(first, _strides_in(_format_of(kind, args[0]), args[0]))
        return (first, *rest) if rest else first
    return result


def _with_strides(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    return result if result.stride() == strides else result.as_strided(result.shape, strides)


def _strides_of_view(func: Any, args: Any) -> tuple[int, ...]:
    """Torch's rule in Python gives a dimension of size 1 another stride than its kernels, for meta tensors too, do."""
    x, *shape = args
    with _disable_current_modes():
        on_meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        strides: tuple[int, ...] = func(on_meta, *shape).stride()
    return strides


def _format_of(kind: Any, x: Tensor) -> torch.memory_format:
    if kind is aten.native_layer_norm or x.is_contiguous():
        return torch.contiguous_format
    if kind is aten.native_batch_norm:  # it takes any stride of a dimension of size 1, which a suggestion does not
        for memory_format, dims in _FORMATS.items():
            if x.dim() == dims and x.is_contiguous(memory_format=memory_format):
                return memory_format
    return suggest_memory_format(x)


def _strides_in(memory_format: torch.memory_format, x: Tensor) -> tuple[int, ...]:
    with _disable_current_modes():
        on_meta = torch.empty_strided(x.shape, x.stride(), device="meta")
        return on_meta.clone(memory_format=memory_format).stride()
