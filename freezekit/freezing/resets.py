"""Resets of running statistics that are held: refused, but for those that fill what has no data yet.

A norm may be held before it has data: a lazy one until its first forward, one on meta until ``to_empty()``. Both are
then filled by a reset, or by a state that is loaded. What was written in place has a version. What was assigned, as by
``load_state_dict(assign=True)``, is told by torch; ``to_empty()`` puts its tensors in past that.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.nn.parameter import is_lazy


class Holder(Protocol):
    """A held layer, and whether its statistics still wait for the reset, or state, that fills them."""

    module: nn.Module
    waits: bool

    def keeps_statistics(self) -> bool: ...
    def tell(self, text: str) -> None: ...
    def belongs_to_copy(self, memo: dict[int, Any]) -> bool: ...


def have_data(tensors: Iterable[torch.Tensor]) -> bool:
    return not any(is_lazy(tensor) or tensor.is_meta for tensor in tensors)


def was_written(tensor: torch.Tensor) -> bool:
    """Whether anything was written in place since it was made."""
    return not tensor.is_inference() and tensor._version > 0


@cache
def hear_of_assignments(end_wait: Callable[[nn.Module], None]) -> None:
    """Has ``end_wait`` called for each module that is about to get a buffer with data."""

    def heard(module: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
        if buffer is not None and "train" in module.__dict__ and have_data([buffer]):
            end_wait(module)

    register_module_buffer_registration_hook(heard)


class KeptStatistics:
    """Stands in for ``reset_running_stats`` of a held layer, and of copies of it; a file's does the same by itself."""

    says = (
        "reset_running_stats() of a layer whose running statistics freeze() holds: they stay as they are, and "
        "torch.optim.swa_utils.update_bn, or what else computes them anew, passes over this layer. If they are to be "
        "computed, call unfreeze() before, on the copy in an AveragedModel too. If to_empty() has emptied them since, "
        "load them"
    )

    def __init__(self, held: Holder) -> None:
        self.held = held

    def __call__(self) -> None:
        if self.held.keeps_statistics():
            self.held.tell(self.says)
            return
        kind: Any = type(self.held.module)
        kind.reset_running_stats(self.held.module)
        self.held.waits = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptStatistics":
        return self if self.held.belongs_to_copy(memo) else KeptStatistics(copy.deepcopy(self.held, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.held.keeps_statistics():
            return partial, (warnings.warn, self.says)
        kind: Any = type(self.held.module)
        return partial, (kind.reset_running_stats, self.held.module)
