"""What a training step runs and keeps, measured from outside: for the examples beside this file."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Gradients(TorchDispatchMode):
    """Counts the convolution gradients that are computed within the block.

    Stock convolutions ask one operator for all of theirs, and its output mask says which (dx, dw, db) it computes;
    freezekit's have an operator each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter(dgrad=0, wgrad=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "aten::convolution_backward":
            dx, dw, _ = args[-1]
            self.count["dgrad"] += dx
            self.count["wgrad"] += dw
        elif name.startswith("freezekit::conv2d_"):
            self.count[name.removeprefix("freezekit::conv2d_")] += 1
        return func(*args, **(kwargs or {}))


class Storages(TorchDispatchMode):
    """Watches every storage that is made within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        """Bytes of those that somebody still holds."""
        gc.collect()
        return sum(size for ref, size in self.seen.values() if not ref.expired())


def bytes_kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass leaves alive for backward: everything but parameters, the input and the output.

    Counted by what is alive, so it does not matter how an operator holds on to it.
    """
    with Storages() as storages:
        y = model(x)
    return storages.alive() - y.untyped_storage().nbytes()


@dataclass(frozen=True)
class Backward:
    """What one backward pass ran: convolution gradients, nodes that put a gradient into ``.grad``, and the additions
    that these needed (none where ``.grad`` was None: then the gradient itself is put there)."""

    dgrad: int
    wgrad: int
    accumulate: int
    additions: int


def _inside(event: Any, name: str) -> bool:
    while event is not None:
        if event.name == name:
            return True
        event = event.cpu_parent
    return False


def backward_of(fresh_loss: Callable[[], Tensor]) -> Backward:
    """What a backward pass runs. Two passes: a dispatch mode would show every operator twice to the profiler.

    Args:
        fresh_loss: clears the gradients, as a training step does, and returns the loss.
    """
    value = fresh_loss()
    with Gradients() as gradients:
        value.backward()
    value = fresh_loss()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        value.backward()
    node = "torch::autograd::AccumulateGrad"
    events = profiler.events()
    nodes = sum(e.name == node for e in events)
    additions = sum(e.name == "aten::add_" and _inside(e, node) for e in events)
    return Backward(gradients.count["dgrad"], gradients.count["wgrad"], nodes, additions)
