"""Strides that results have with data, where torch gives them others without.

They decide which kernel attention takes, and what ``contiguous`` and ``reshape`` copy: of one image, the second of two
attentions kept 12 times what was told of it. Torch's rules in Python for tensors without data get many of them wrong,
most where a dimension of size 1 has a stride of its own. Torch's code in C++ is asked instead, on meta tensors; what a
CPU's kernels do otherwise is listed here.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten

_VIEWS = (aten.view, aten._unsafe_view)
# What a CPU's kernels write in a memory format, whatever the strides of their input.
_IN_A_FORMAT = (
    *(aten.native_batch_norm, aten.native_group_norm, aten.native_layer_norm),
    *(
        aten.channel_shuffle,
        aten.native_channel_shuffle,
        aten.roll,
        aten.poisson,
        aten.log_sigmoid_forward,
        aten.rrelu_with_noise,
        aten.normal,
    ),
    *(aten.max_unpool2d, aten.pixel_shuffle, aten.pixel_unshuffle),
    *(aten.replication_pad2d, aten.reflection_pad3d, aten.replication_pad3d, aten.nll_loss2d_forward, aten.diag_embed),
)
_CONTIGUOUS = (
    *(aten.native_layer_norm, aten.log_sigmoid_forward, aten.rrelu_with_noise, aten.normal),
    *(aten.nll_loss2d_forward, aten.diag_embed, aten.poisson),
)
_CONTIGUOUS_FIRST = (aten.native_batch_norm, aten.channel_shuffle, aten.native_channel_shuffle)
# What is allocated as a tensor like the input, before an iterator could choose.
_LIKE_INPUT = (
    *(aten.hardtanh, aten._prelu_kernel, aten.flip, aten.sort, aten.huber_loss, aten.binary_cross_entropy),
    aten._scaled_dot_product_flash_attention_for_cpu,
)
# What an iterator lays out, though torch does not tag it so, or has code for it that allocates nothing.
_ITERATED = (
    *(aten.hardswish.default, aten.rsub.Tensor, aten.floor_divide.default, aten.abs.default),
    *(aten.complex.default, aten.polar.default, aten.logical_not.default),
    *(aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default),
)
_FORMATS = {torch.channels_last: 4, torch.channels_last_3d: 5}
# By how many tensors they read, functions of single elements that are laid out by the iterator and no more.
_BY_ITERATOR = {1: aten.neg.default, 2: aten.hypot.default, 3: aten.lerp.Tensor}
# Under which keys torch has an operator's code in C++ that is no kernel of a device.
_STRUCTURED, _COMPOSED = DispatchKey.CompositeExplicitAutogradNonFunctional, DispatchKey.CompositeExplicitAutograd
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float32, complex: torch.complex64}


class _Laying(TorchDispatchMode):
    """Lays out what an operator's code on meta tensors gets from others, as on a device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _with_numbers_as_tensors(func, args), kwargs or {}
        return lay_out(func, args, kwargs, func(*args, **kwargs), self.device)


def lay_out(func: Any, args: Any, kwargs: Any, result: Any, device: str | None = None) -> Any:
    """The result of an operator on tensors without data, with the strides that it has with data.

    Args:
        func, args, kwargs: the operator, and what it was called with.
        device: the type of the device that the data would be on; None for that of the tensors.
    """
    tensors = _tensors(args, kwargs)
    if not tensors or func.namespace != "aten" or any(t.layout is not torch.strided for t in _tensors(tensors, result)):
        return result
    kind, device = func.overloadpacket, device or tensors[0].device.type
    first, *rest = result if isinstance(result, tuple) else (result,)
    if kind in _IN_A_FORMAT and device == "cpu":
        first = _with_strides(first, _strides_in(_format_of(kind, args), first))
        rest = [_with_strides(one, _strides_in(torch.contiguous_format, one)) for one in rest]
    elif func._schema.is_mutable:
        return result
    elif kind in _LIKE_INPUT:
        strides = _strides_in(torch.preserve_format, args[0])
        first, *rest = (_with_strides(one, strides) if one.shape == args[0].shape else one for one in (first, *rest))
    elif func not in _ITERATED and (key := _key_of(func, device)) is not None:
        first, *rest = map(_as, (first, *rest), _on_meta(func, key, args, kwargs, device) or (first, *rest))
    elif func in _ITERATED or torch.Tag.pointwise in func.tags:
        first = _as(first, _by_iterator(func, args))
    return (first, *rest) if isinstance(result, tuple) else first


def _tensors(*values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


@cache
def _key_of(func: Any, device: str) -> DispatchKey | None:
    """Under which key an operator's code in C++ lays its result out on a device; None where a kernel does that."""
    kind, name = func.overloadpacket, func.name()
    if kind in _VIEWS:
        return DispatchKey.Meta
    if func.is_view or kind is aten.convolution:  # which chooses another operator for each device
        return None
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    key = _STRUCTURED if has(name, "CUDA" if device == "cuda" else "CPU") else _COMPOSED
    return key if has(name, key.name) else None


def _on_meta(func: Any, key: DispatchKey, args: Any, kwargs: Any, device: str) -> tuple[Any, ...] | None:
    """What an operator's code in C++ gives for tensors of the same form, without data; None where it reads values."""
    with _disable_current_modes():
        args, kwargs = tree_map_only(Tensor, _meta, (_with_numbers_as_tensors(func, args), kwargs))
        kwargs = {name: "meta" if isinstance(value, torch.device) else value for name, value in kwargs.items()}
        with _Laying(device), suppress(RuntimeError):
            made = func._op_dk(key, *args, **kwargs)
            return made if isinstance(made, tuple) else (made,)
    return None


def _with_numbers_as_tensors(func: Any, args: Any) -> list[Any]:
    """A number that an operator takes for a tensor is an operand of its iterator."""
    wraps = func is aten.remainder.Scalar_Tensor  # whose kernel makes a tensor of its number
    every = zip(args, func._schema.arguments)
    return [_number(v) if wraps or isinstance(formal.type, torch.TensorType) else v for v, formal in every]


def _number(value: Any) -> Any:
    return torch.empty((), dtype=_NUMBERS[type(value)], device="meta") if type(value) in _NUMBERS else value


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _as(result: Any, other: Any) -> Any:
    """A result with the strides of another; a mean of losses has one of the losses."""
    same = isinstance(result, Tensor) and isinstance(other, Tensor) and result.shape == other.shape
    return _with_strides(result, other.stride()) if same else result


def _with_strides(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    return result if result.stride() == strides else result.as_strided(result.shape, strides)


def _format_of(kind: Any, args: Any) -> torch.memory_format:
    x, *rest = args
    if kind in _CONTIGUOUS or (kind in _CONTIGUOUS_FIRST and x.is_contiguous()):
        return torch.contiguous_format
    if kind is aten.roll:  # what does not move is joined with nothing, and what moves as a whole is flat
        shifts, dims = rest[0], rest[1] if len(rest) > 1 else ()
        if not dims or any(shift % max(1, x.shape[dim]) == 0 for shift, dim in zip(shifts, dims)):
            return torch.contiguous_format
    if kind is aten.native_batch_norm:  # it takes any stride of a dimension of size 1, which a suggestion does not
        for memory_format, dims in _FORMATS.items():
            if x.dim() == dims and x.is_contiguous(memory_format=memory_format):
                return memory_format
    return suggest_memory_format(x)


def _strides_in(memory_format: torch.memory_format, x: Tensor) -> tuple[int, ...]:
    with _disable_current_modes():
        return _meta(x).clone(memory_format=memory_format).stride()


def _by_iterator(func: Any, args: Any) -> Tensor | None:
    """What torch's iterator allocates for a function of single elements; None for one that it is not known to read."""
    with _disable_current_modes():
        tensors = _tensors(_with_numbers_as_tensors(func, args))
        if func is aten.rsub.Tensor:
            tensors.reverse()
        forms = [torch.empty_strided(t.shape, t.stride(), device="meta") for t in tensors]
        return _BY_ITERATOR[len(forms)]._op_dk(_STRUCTURED, *forms) if len(forms) in _BY_ITERATOR else None
