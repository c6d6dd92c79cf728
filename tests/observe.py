"""What a computation runs and keeps, seen from outside."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from freezekit import _C
from freezekit.planning import Machine

MACHINE = Machine(
    flops=1e9, bandwidth=1e9
)  # where the times of a plan do not matter: to measure one takes half a second


class Calls(TorchDispatchMode):
    """Counts the operators that reach a backend within the block, by name, e.g. "freezekit::conv2d_dgrad"."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def gradients(self) -> tuple[int, int]:
        """(dgrad, wgrad) operators that ran."""
        return self.count["freezekit::conv2d_dgrad"], self.count["freezekit::conv2d_wgrad"]


class Storages(TorchDispatchMode):
    """Watches every storage made within the block; `kept` is the bytes of those still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def forget(self, tensor: Tensor) -> None:
        """Stop watching a storage that somebody else holds, as a model holds its parameters."""
        self._seen.pop(tensor.untyped_storage()._cdata, None)

    @property
    def kept(self) -> int:
        gc.collect()
        return self.alive

    @property
    def alive(self) -> int:
        """As `kept`, with what only Python's collector would free."""
        return sum(size for ref, size in self._seen.values() if not ref.expired())


def bytes_kept(forward: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of new storages that only autograd keeps after `forward`, without its output and a module's own tensors.

    `forward` gets a copy of `x` that is an intermediate result: its storage lives on only if autograd keeps it.
    """
    with Storages() as storages:
        y = forward(x * 1)
    if isinstance(forward, nn.Module):
        for tensor in (*forward.parameters(), *forward.buffers()):
            storages.forget(tensor)
    return storages.kept - y.untyped_storage().nbytes()


class Packed:
    """What autograd holds in place of a saved tensor; without the tensor's graph, in which it may be itself."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def bytes_saved(call: Callable[[], Any], owned: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd holds after `call`, as long as its result is held, those of `owned` aside.

    Unlike `bytes_kept` it needs no dispatch mode, under which torch.compile does not compile.
    """
    storages: dict[int, tuple[StorageWeakRef, int]] = {}
    holds: list[tuple[int, weakref.ref[Packed]]] = []

    def pack(tensor: Tensor) -> Packed:
        packed, storage = Packed(tensor), tensor.untyped_storage()
        if not _C.chains.is_let_go():
            holds.append((storage._cdata, weakref.ref(packed)))
            storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return packed

    with saved_tensors_hooks(pack, lambda packed: packed.tensor):
        result = call()
    assert result is not None
    held = {key for key, packed in holds if packed() is not None}
    held -= {tensor.untyped_storage()._cdata for tensor in owned}
    return sum(storages[key][1] for key in held)
