"""Counts the bytes that work allocates, keeps and holds at its peak, from the allocator itself.

Hooks on saved tensors miss what a node holds by other means, and so do Python references. The allocator misses nothing
that torch allocates: on a CPU torch.profiler records every allocation and release, exact to the byte; on a GPU the
caching allocator keeps the sums, rounded up to its blocks of 512 bytes. Neither sees what libraries allocate
themselves, such as oneDNN's scratch space.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType


@dataclass(frozen=True)
class Memory:
    """Bytes relative to those held before the work began.

    Attributes:
        kept: still held when the work has returned, through what it returned or stored.
        peak: the most held at any time.
    """

    kept: int
    peak: int


def trace(device: torch.device, work: Callable[[], object]) -> Memory:
    """Runs `work` once and counts its memory on `device`; what it returns is held until the count is taken.

    Garbage is collected first, so that no release of older memory is counted.
    """
    gc.collect()
    return _trace_cuda(device, work) if device.type == "cuda" else _trace_cpu(work)


def _trace_cpu(work: Callable[[], object]) -> Memory:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as profiler:
        result = work()
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    if results is None:
        raise RuntimeError("torch.profiler recorded nothing: is another profiler running?")
    del result
    made: dict[int, int] = {}
    held = peak = 0
    for _, address, change in sorted(_allocations(results.experimental_event_tree()), key=lambda event: event[0]):
        if change > 0:
            made[address] = change
            held += change
        else:
            # Torch keeps the sizes of recorded allocations that were released unrecorded, and takes an older tensor at
            # the same address for one of them: only what was allocated here is released here.
            held -= made.pop(address, 0)
        peak = max(peak, held)
    return Memory(held, peak)


def _allocations(events: list[Any]) -> Iterator[tuple[int, int, int]]:
    """The time, address and bytes of each allocation; of each release, with a minus sign."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def _trace_cuda(device: torch.device, work: Callable[[], object]) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = work()
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device) - before
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return Memory(held, peak)


def bytes_kept(forward: Callable[[Tensor], Tensor], leaf: Tensor) -> int:
    """What the graph of ``forward(x)`` keeps for the backward pass, x itself included if it is kept.

    x is a copy of `leaf` made within the count, and nothing but the graph outlives it: neither x nor the output is
    referenced when the count is taken. Parameters existed before and do not count.
    """

    def work() -> object:
        return forward(leaf.clone()).grad_fn

    work()  # What libraries set up once is not part of what one step keeps.
    return trace(leaf.device, work).kept
