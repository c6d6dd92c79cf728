"""Tensors that are not written to for good, by whatever name a run reaches them."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from freezekit._storages import storages_of
from freezekit._twin.higher_order import call_higher_order, is_higher_order


class Untouched(TorchDispatchMode):
    """Knows all tensors that there are; what runs within it may write to them until `put_back`.

    No search through names finds all that a function reaches. So operators are looked at: what one reads that was there
    before is copied first, and put back. Of parameters, which may be large, only those that an operator says it writes
    to: batch norm's operators write to running statistics, and do not say so.

    What goes past torch's operators is not seen: ``tensor.numpy()[0] = 1``, ``tensor.data = other``.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._there = _there()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._forms: dict[int, tuple[Tensor, torch.UntypedStorage, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        says_so = getattr(getattr(func, "_schema", None), "is_mutable", True)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                for storage in _storages_if_any(tensor):
                    if storage._cdata in self._there.storages:
                        self._look_at(tensor, storage, says_so)
        if is_higher_order(func):
            return call_higher_order(self, func, args, kwargs or {}, has_data=True)
        return func(*args, **(kwargs or {}))

    def _look_at(self, tensor: Tensor, storage: torch.UntypedStorage, written: bool) -> None:
        key = storage._cdata
        if key not in self._before and (written or key not in self._there.parameters):
            self._before[key] = (storage, storage.clone())
        if written and type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
            self._forms.setdefault(id(tensor), (tensor, storage, form_of(tensor)))

    def put_back(self) -> None:
        """Undoes what was written."""
        for tensor, storage, form in self._forms.values():
            if form_of(tensor) != form:
                with torch.no_grad():
                    tensor.set_(storage, *form[1:])
        self._forms.clear()
        for storage, before in self._before.values():
            if storage.nbytes() < before.nbytes():
                storage.resize_(before.nbytes())
            now, then = _bytes_of(storage)[: before.nbytes()], _bytes_of(before)
            if not torch.equal(now, then):  # else it may be memory that is only to be read
                now.copy_(then)
        self._before.clear()


@dataclass
class _There:
    """The storages of all tensors that there were at a time, by address, and which are parameters'.

    Weak references: nothing is kept alive, but no new storage takes the address of one that went.
    """

    storages: dict[int, StorageWeakRef] = field(default_factory=dict)
    parameters: set[int] = field(default_factory=set)

    @classmethod
    def now(cls) -> _There:
        there = cls()
        with torch._C.DisableTorchFunction():
            for tensor in _all_tensors():
                if is_traceable_wrapper_subclass(tensor):  # Python knows what it wraps
                    continue
                for storage in _storages_if_any(tensor):
                    there.storages.setdefault(storage._cdata, StorageWeakRef(storage))
                    if isinstance(tensor, nn.Parameter):
                        there.parameters.add(storage._cdata)
        return there


# Advice is from runs with freezekit enabled, which is for all threads: what another explains meanwhile would keep less.
_one_at_a_time = threading.Lock()
# A child forked while another thread holds it would wait for ever.
if hasattr(os, "register_at_fork"):  # a system that has fork
    os.register_at_fork(after_in_child=_one_at_a_time._at_fork_reinit)  # type: ignore[attr-defined]
_looked: ContextVar[list[_There] | None] = ContextVar("_looked", default=None)


@contextmanager
def looking_once() -> Iterator[None]:
    """Context manager, for one thread at a time: the tensors that there are, are for all runs those of the first.

    To find them takes 0.1 s where Python holds 300,000 objects, and a plan may run a model a hundred times. What a run
    makes and leaves somewhere, it may write to when it is run again.

    Raises:
        RuntimeError: a run within it asks for another, which would copy the copies, and those of all that it made.
    """
    if _looked.get() is not None:
        raise RuntimeError("explain, plan and audit run a copy of what they are given, which must not call any of them")
    with _one_at_a_time:
        token = _looked.set([])
        try:
            yield
        finally:
            _looked.reset(token)


def _there() -> _There:
    looked = _looked.get()
    if looked is None:
        return _There.now()
    if not looked:
        looked.append(_There.now())
    return looked[0]


def _all_tensors() -> Iterator[Tensor]:
    """All that Python knows, and their gradients, of which it may not."""
    kinds, left = set(), [Tensor]
    while left:
        kinds.add(kind := left.pop())
        left += [one for one in type.__subclasses__(kind) if one not in kinds]
    for tensor in _all_of(kinds):
        yield tensor
        if tensor.is_leaf and tensor.grad is not None:
            yield tensor.grad


class _Mark:
    """One is made once frozen tensors are known: it is frozen itself by the next ``gc.freeze()``."""


_frozen: tuple[_Mark, list[TensorWeakRef]] | None = None


def _all_of(kinds: set[Any]) -> list[Tensor]:
    """All that the garbage collector knows, with what a program took out of its sight by ``gc.freeze()``.

    To find that takes as long as to list all objects three times. It is known from then on: nothing comes to it but by
    another ``gc.freeze()``, and what leaves it is listed again.
    """
    global _frozen
    listed = _instances({*kinds, _Mark})
    known = _frozen
    if known is not None and any(one is known[0] for one in listed):
        every = (*listed, *(ref() for ref in known[1]))
        return [one for one in every if one is not None and one is not known[0]]
    _frozen = None
    if not gc.get_freeze_count():
        return listed
    del listed
    gc.collect()  # garbage is not to be frozen below
    enabled = gc.isenabled()
    gc.disable()
    gc.unfreeze()
    try:
        found = _instances(kinds)
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
    _frozen = _Mark(), [TensorWeakRef(tensor) for tensor in found]
    return found


def _instances(kinds: set[Any]) -> list[Any]:
    objects = gc.get_objects()
    return list(compress(objects, map(kinds.__contains__, map(type, objects))))


def form_of(tensor: Tensor) -> tuple[Any, ...]:
    """What tells where a strided tensor's elements are."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.size(), tensor.stride()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storages_if_any(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Those with data."""
    if tensor.is_meta:
        return []
    try:
        return [storage for storage in storages_of(tensor) if storage.device.type != "meta"]
    except (NotImplementedError, RuntimeError):  # of those that transforms of torch.func wrap
        return []
