"""What a backward pass runs, seen from outside: for the example beside this file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


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
