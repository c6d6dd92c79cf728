"""Weights that were declared constant, and what is kept of them across steps.

A frozen weight is used in other forms than its own: cast to bfloat16 under autocast, rotated and transposed for dgrad,
folded with a batch norm. Those of a weight that is declared constant are made once. Only `freeze` and `fuse` declare:
a weight that merely has ``requires_grad=False`` is prepared at each call, since somebody may write to it unseen.

Seen, and never served stale: ``load_state_dict``, ``copy_`` and other in-place operations, optimizer steps, ``.to()``,
``.data = ...``, ``requires_grad_()``. Not seen: in-place writes through ``.data`` or a numpy view, and steps of a fused
optimizer, which change neither version nor storage; `guard` stops the latter. After such a write call `invalidate`;
`verify_constants` finds what it made stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor, nn

import freezekit._C as _C

__all__ = [
    "declare_constant",
    "follow",
    "invalidate",
    "is_constant",
    "register_cache",
    "usage",
    "verify_constants",
    "withdraw_constant",
]


class Cache(Protocol):
    """Keeps what is made of several constants together, such as a weight and a batch norm."""

    def drop(self, model: nn.Module | Tensor) -> None:
        """Forgets what it made of the model's constants, or of one tensor."""

    def verify(self, model: nn.Module | Tensor) -> None:
        """Raises RuntimeError where something that it keeps is stale."""


_caches: list[Cache] = []


def register_cache(cache: Cache) -> None:
    """Lets `invalidate` and `verify_constants` reach a cache of a layer above."""
    _caches.append(cache)


def declare_constant(tensor: Tensor) -> None:
    """Lets forms of a frozen tensor be kept across steps, until it dies, is withdrawn or needs a gradient.

    It stays so when its ``.data`` is assigned, as ``.to()`` does; a parameter that `torch.utils.swap_tensors` gives
    another tensor, as ``.to()`` does on request, is undeclared.

    Args:
        tensor: a parameter or buffer; any dtype, device and size.

    Raises:
        RuntimeError: if it requires grad, or is an inference tensor (which has no version counter).

    >>> import torch
    >>> weight = torch.ones(4, 3, 3, 3)
    >>> declare_constant(weight)
    >>> is_constant(weight)
    True
    """
    _C.constants.declare(tensor)


def withdraw_constant(tensor: Tensor) -> None:
    """Ends what `declare_constant` began, and drops what was kept; fine if it never began."""
    _C.constants.withdraw(tensor)


def is_constant(tensor: Tensor) -> bool:
    """Whether the tensor is declared constant."""
    return _C.constants.is_declared(tensor)


def follow(tensors: Iterable[Tensor]) -> None:
    """Declares those of the tensors that are frozen and withdraws those that learn: what `freeze` and `unfreeze` do.

    Inference tensors, which have no version counter, and lazy parameters, which have no data yet, are left out: their
    forms are made at each call.
    """
    for tensor in tensors:
        if nn.parameter.is_lazy(tensor):
            continue
        if tensor.requires_grad:
            withdraw_constant(tensor)
        elif not tensor.is_inference():
            declare_constant(tensor)


def invalidate(model: nn.Module | Tensor) -> None:
    """Drops what is kept of a model's constants: call it after writing through ``.data`` or a numpy view.

    They stay declared; the next call makes their forms again.

    >>> import torch
    >>> weight = torch.ones(4, 3, 3, 3)
    >>> declare_constant(weight)
    >>> weight.data.mul_(2)[0, 0, 0, 0]
    tensor(2.)
    >>> invalidate(weight)
    """
    for _, tensor in _tensors(model):
        _C.constants.invalidate(tensor)
    for cache in _caches:
        cache.drop(model)


def verify_constants(model: nn.Module | Tensor) -> None:
    """Makes every kept form again and compares: a debug check that costs as much as having no cache.

    Raises:
        RuntimeError: if one is stale, naming the tensor, the form and the cure.

    >>> import torch
    >>> verify_constants(nn.Conv2d(3, 4, 3))
    """
    for name, tensor in _tensors(model):
        for form in _C.constants.stale(tensor):
            raise RuntimeError(
                f"the kept {form} of constant {name!r} is stale: it was written to in a way that changes neither "
                "version nor storage (.data, numpy); call freezekit.constants.invalidate(model) after such a write"
            )
    for cache in _caches:
        cache.verify(model)


def usage() -> dict[str, int]:
    """Counts of the whole process: declared tensors, cached forms, their bytes, hits and misses.

    >>> sorted(usage())
    ['bytes', 'cached', 'declared', 'hits', 'misses']
    """
    return _C.constants.usage()


def _tensors(model: nn.Module | Tensor) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model, Tensor):
        yield "", model
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or a Tensor, got {type(model).__name__}")
    yield from model.named_parameters()
    yield from model.named_buffers()
