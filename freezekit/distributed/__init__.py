"""Freezing under DistributedDataParallel: see the change that it does not see, and rebuild the wrapper.

DDP decides at construction which gradients it reduces: those of the parameters that require grad *then*. A parameter
frozen later makes it wait for a gradient that never comes (an error one iteration on); one unfrozen later is reduced by
nobody, and **the ranks diverge without a word**. `mismatch` finds both, `watch` turns them into an error before the
next forward pass, and `rewrap` builds a new wrapper with its settings.

FSDP2 (``fully_shard``) reads ``requires_grad`` at every forward pass, so it needs none of this; ranks must only agree
on what is frozen, which `check_ranks` asks them.
"""

from freezekit.distributed.rewrapping import check_ranks, rewrap, sync_buffers
from freezekit.distributed.watching import (
    Mismatch,
    StaleWrapperError,
    check,
    mismatch,
    reduced,
    watch,
    wrappers,
)

__all__ = [
    "Mismatch",
    "StaleWrapperError",
    "check",
    "check_ranks",
    "mismatch",
    "reduced",
    "rewrap",
    "sync_buffers",
    "watch",
    "wrappers",
]
