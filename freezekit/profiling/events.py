"""What torch.profiler recorded, as plain records: CPU operators in a tree, and device kernels linked to them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

_RUNTIME = re.compile("cuda[A-Z]|cu[A-Z]")


@dataclass(eq=False)
class Event:
    """One operator call on the host, or one kernel, copy or fill on a device.

    Attributes:
        name: the operator's name with its namespace, or the kernel's name.
        start, end: nanoseconds since the profiler's epoch.
        on_device: whether it ran on an accelerator.
        thread: of the host; 0 for device work.
        correlation: the number by which device work refers to the operator that launched it.
        launched_by: that number, for device work; 0 where unknown.
        inputs: the operator's non-tensor arguments by position (None for tensors).
        parent, children: nesting on the host.
    """

    name: str
    start: int
    end: int
    on_device: bool = False
    thread: int = 0
    correlation: int = 0
    launched_by: int = 0
    inputs: list[Any] = field(default_factory=list)
    parent: Event | None = None
    children: list[Event] = field(default_factory=list)

    @property
    def duration(self) -> int:
        """Nanoseconds."""
        return self.end - self.start

    def ancestors(self) -> Iterator[Event]:
        """This event, the one it ran in, and so on outwards."""
        event: Event | None = self
        while event is not None:
            yield event
            event = event.parent


def read(profiler: torch.profiler.profile) -> list[Event]:
    """The operators and kernels of a finished profiler; its own bookkeeping and memory records left out."""
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    if results is None:
        return []
    events = []
    for raw in results.events():
        on_device = raw.device_type() != torch.profiler.DeviceType.CPU
        if raw.name().startswith(("profiler::", "[")) or (on_device and raw.is_user_annotation()):
            continue
        launched_by = raw.linked_correlation_id()
        if not on_device and (launched_by or _RUNTIME.match(raw.name())):
            continue  # The runtime's side of a launch: its kernel stands for it, and it numbers its calls by itself.
        events.append(
            Event(
                name=raw.name(),
                start=raw.start_ns(),
                end=raw.end_ns(),
                on_device=on_device,
                thread=0 if on_device else raw.start_thread_id(),
                correlation=raw.correlation_id(),
                launched_by=launched_by,
                inputs=raw.concrete_inputs() or [],
            )
        )
    return nest(events)


def nest(events: Iterable[Event]) -> list[Event]:
    """Links host events to the ones they ran in (by thread and interval), and device work to what launched it.

    Returns the same events ordered by start.
    """
    ordered = sorted(events, key=lambda e: (e.start, -e.end))
    open_by_thread: dict[int, list[Event]] = {}
    by_correlation: dict[int, Event] = {}
    for event in ordered:
        if event.on_device:
            continue
        stack = open_by_thread.setdefault(event.thread, [])
        while stack and event.end > stack[-1].end:
            stack.pop()
        if stack:
            event.parent = stack[-1]
            stack[-1].children.append(event)
        stack.append(event)
        by_correlation[event.correlation] = event
    for event in ordered:
        if event.on_device:
            event.parent = by_correlation.get(event.launched_by)
    return ordered
