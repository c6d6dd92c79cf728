"""Strides that results have with data, where torch gives them others without.

They decide which kernel attention takes, and what ``contiguous`` and ``reshape`` copy: of one image, the second of two
attentions kept 12 times what was told of it.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

_VIEWS = (aten.view, aten._unsafe_view)
_UPSAMPLES = (
    *(aten.upsample_nearest2d, aten._upsample_nearest_exact2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
    *(aten.upsample_nearest3d, aten._upsample_nearest_exact3d, aten.upsample_trilinear3d),
)
# What a CPU's kernels write in a memory format, whatever the strides of their input.
_IN_A_FORMAT = (
    *(aten.native_batch_norm, aten.native_group_norm, aten.native_layer_norm),
    *(aten.channel_shuffle, aten.roll, aten.log_sigmoid_forward, aten.rrelu_with_noise, *_UPSAMPLES),
)
_CONTIGUOUS = (aten.native_layer_norm, aten.log_sigmoid_forward, aten.rrelu_with_noise)
_CONTIGUOUS_FIRST = (aten.native_batch_norm, aten.channel_shuffle)
# What is allocated as a tensor like the input, before an iterator could choose.
_LIKE_INPUT = (aten.hardtanh, aten._prelu_kernel, aten.flip)
# Tagged as functions of single elements, whose results are allocated otherwise.
_NOT_ITERATED = (aten.clone, aten._to_copy, aten.masked_fill)
# Of their overloads for numbers, the number is an operand as well.
_WRAPPED = (
    aten.eq,
    aten.ne,
    aten.lt,
    aten.le,
    aten.gt,
    aten.ge,
    aten.rsub,
    aten.remainder,
    aten.fmod,
    aten.floor_divide,
)
_FORMATS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def lay_out(func: Any, args: Any, result: Any) -> Any:
    """The result of an operator on tensors without data, with the strides that it has with data."""
    kind = func.overloadpacket
    if kind in _VIEWS:
        return _with_strides(result, _strides_of_view(func, args))
    if kind in _IN_A_FORMAT and args[0].device.type == "cpu":
        first, *rest = result if isinstance(result, tuple) else (result,)
        first = _with_strides(first, _strides_in(_format_of(kind, args), first))
        return (first, *rest) if rest else first
    if kind in _LIKE_INPUT:
        return _with_strides(result, _strides_in(torch.preserve_format, args[0]))
    if func is aten.pow.Scalar:
        return _with_strides(result, _strides_in(torch.contiguous_format, args[1]))
    if torch.Tag.pointwise in func.tags and kind not in _NOT_ITERATED and _is_allocated(func, result):
        return _with_strides(result, _strides_of_iterator(result, _operands(func, args)))
    return result


def _is_allocated(func: Any, result: Any) -> bool:
    """Whether an operator allocates its only result, of a layout that has strides."""
    allocates = not (func._schema.is_mutable or func.is_view)
    return allocates and isinstance(result, Tensor) and result.layout is torch.strided


def _with_strides(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    return result if result.stride() == strides else result.as_strided(result.shape, strides)


def _strides_of_view(func: Any, args: Any) -> tuple[int, ...]:
    """Torch's rule in Python gives a dimension of size 1 another stride than its kernels, for meta tensors too, do."""
    x, *shape = args
    with _disable_current_modes():
        on_meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        strides: tuple[int, ...] = func(on_meta, *shape).stride()
    return strides


def _format_of(kind: Any, args: Any) -> torch.memory_format:
    x, *rest = args
    if kind in _CONTIGUOUS or (kind in _CONTIGUOUS_FIRST and x.is_contiguous()):
        return torch.contiguous_format
    if kind is aten.roll:  # what does not move is joined with nothing, and what moves as a whole is flat
        shifts, dims = rest[0], rest[1] if len(rest) > 1 else ()
        if not dims or any(shift % x.shape[dim] == 0 for shift, dim in zip(shifts, dims)):
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


def _strides_of_iterator(result: Tensor, operands: list[Any]) -> tuple[int, ...]:
    """As ATen's TensorIterator allocates the result of a function of single elements; a number is an operand too."""
    shape, tensors = result.shape, [value for value in operands if isinstance(value, Tensor)]
    if all(isinstance(value, Tensor) and value.shape == shape for value in operands):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            possible = memory_format is torch.contiguous_format or len(shape) == 4
            if possible and all(tensor.is_contiguous(memory_format=memory_format) for tensor in tensors):
                return _strides_in(memory_format, tensors[0])
        strides = tensors[0].stride()
        if all(tensor.stride() == strides and _is_dense(tensor) for tensor in tensors):
            return strides
    order = list(range(len(shape)))[::-1]
    every = [_broadcast_strides(tensor, shape) for tensor in tensors]
    for i in range(1, len(order)):
        here = i
        for there in range(i - 1, -1, -1):
            compared = _compare(order[there], order[here], every, shape)
            if compared > 0:
                order[there], order[here] = order[here], order[there]
                here = there
            elif compared < 0:
                break
    return tuple(prod(shape[inner] for inner in order[: order.index(dim)]) for dim in range(len(shape)))


def _operands(func: Any, args: Any) -> list[Any]:
    """The tensors among the arguments, and the numbers that an operator takes for tensors."""
    every = zip(func._schema.arguments, args)
    wrapped = func.overloadpacket in _WRAPPED
    return [value for formal, value in every if wrapped or isinstance(formal.type, torch.TensorType)]


def _compare(dim: int, other: int, every: list[list[int]], shape: torch.Size) -> int:
    """1 where `dim` is to be outside of `other`, -1 where inside; 0 where no operand tells."""
    for strides in every:
        if strides[dim] and strides[other]:
            if strides[dim] != strides[other]:
                return 1 if strides[dim] > strides[other] else -1
            if shape[dim] > shape[other]:
                return 1
    return 0


def _broadcast_strides(tensor: Tensor, shape: torch.Size) -> list[int]:
    pairs = zip(tensor.shape, tensor.stride(), shape[len(shape) - tensor.dim() :])
    own = [0 if size == 1 != whole else stride for size, stride, whole in pairs]
    return [0] * (len(shape) - tensor.dim()) + own


def _is_dense(tensor: Tensor) -> bool:
    return bool(torch._prims_common.is_non_overlapping_and_dense_or_false(tensor))
