"""What torch.profiler recorded, operators in a tree and kernels linked to them; what each computes of a convolution."""

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


MARK = "freezekit: a recording begins"  # the first event of one, without which another has taken its place


def read(profiler: torch.profiler.profile) -> list[Event] | None:
    """The operators and kernels of a finished profiler; its own bookkeeping and memory records left out.

    None where the recording is not the one that began with `MARK`.
    """
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    recorded = results.events() if results is not None else []
    if not any(raw.name() == MARK for raw in recorded):
        return None
    events = []
    for raw in recorded:
        if raw.name() == MARK:
            continue
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


PHASES = ("fprop", "dgrad", "wgrad", "db", "epilogue")

_BY_OPERATOR = {
    "freezekit::conv2d": ("fprop",),
    "freezekit::conv2d_dgrad": ("dgrad",),
    "freezekit::conv2d_wgrad": ("wgrad",),
    "freezekit::conv2d_bias_grad": ("db",),
    "freezekit::convolution": ("fprop",),
    # Bias, residual, activation and mask are applied where the sums are made.
    "freezekit::frozen_conv2d": ("fprop", "epilogue"),
    "freezekit::frozen_conv2d_shared": ("fprop", "epilogue"),
    "freezekit::frozen_conv2d_dgrad": ("dgrad", "epilogue"),
    **{f"aten::conv{d}d": ("fprop",) for d in (1, 2, 3)},
    **{f"aten::conv_transpose{d}d": ("fprop",) for d in (1, 2, 3)},
    "aten::convolution": ("fprop",),
    "aten::_convolution": ("fprop",),
    "aten::cudnn_convolution": ("fprop",),
    "aten::mkldnn_convolution": ("fprop",),
}
# What an operator means inside freezekit's autograd nodes: a dgrad is a (transposed) convolution, a db is a sum.
_IN_NODE = {
    "FreezekitConv2dBackward": {"aten::sum": ("db",)},
    "FreezekitConvolutionBackward": {"aten::sum": ("db",), "aten::convolution": ("dgrad",)},
    "FreezekitFrozenConv2dBackward": {"freezekit::gate": ("epilogue",)},
}
_BACKWARD = "aten::convolution_backward"
# As cuDNN, CUTLASS and freezekit name kernels, and as torch names its own depthwise ones.
_IN_KERNEL_NAME = {
    "fprop": re.compile("fprop"),
    "dgrad": re.compile("dgrad|depthwise2d_backward|backward_input"),
    "wgrad": re.compile("wgrad|grad_weight|backward_weight"),
}
_GATE_KERNEL = re.compile("gate_kernel")
# cuDNN's conversions between layouts; others, which have general names, count as a part of what they are run for.
_LAYOUT_KERNEL = re.compile("nchw_?to_?nhwc|nhwc_?to_?nchw", re.IGNORECASE)


def phases_of_operator(event: Event) -> tuple[str, ...]:
    """What this operator call computes for a convolution; () if it is none.

    `aten::convolution_backward` computes whatever its output_mask (its last argument) asks for.
    """
    if event.name == _BACKWARD:
        mask = event.inputs[-1] if event.inputs else None
        if not isinstance(mask, (list, tuple)) or len(mask) != 3:
            raise ValueError(f"{_BACKWARD} was recorded without its output_mask: profile with record_shapes=True")
        return tuple(phase for phase, asked in zip(("dgrad", "wgrad", "db"), mask) if asked)
    in_node = _IN_NODE.get(event.parent.name, {}) if event.parent is not None else {}
    if event.name in in_node:
        return in_node[event.name]
    return _BY_OPERATOR.get(event.name, ())


def is_operator(event: Event) -> bool:
    """Whether this host event is an operator's call, not a region (an autograd node, an annotation) around some."""
    return "::" in event.name and not event.name.startswith(("autograd::", "torch::"))


def outermost_operators(events: list[Event]) -> Iterator[Event]:
    """Host operators that no other operator called: their times add up to all operators' time, each counted once."""
    for event in events:
        if event.on_device or not is_operator(event):
            continue
        if not any(is_operator(outer) for outer in event.ancestors() if outer is not event):
            yield event


def phases_of_kernel(event: Event) -> tuple[str, ...]:
    """What this kernel computes for a convolution, read from the operator that launched it.

    Where one operator computes several, as an `aten::convolution_backward` that was asked for both gradients, the
    kernel's own name decides; a kernel that does not tell keeps them all, and one that convolves keeps its epilogue.
    One that only lays a tensor out otherwise computes none.
    """
    if _LAYOUT_KERNEL.search(event.name):
        return ()
    found: tuple[str, ...] = ()
    for outer in event.ancestors():
        if not outer.on_device:
            found = phases_of_operator(outer) or found
    if "epilogue" in found and _GATE_KERNEL.search(event.name):
        return ("epilogue",)
    name = event.name.lower()
    named = {phase for phase, pattern in _IN_KERNEL_NAME.items() if phase in found and pattern.search(name)}
    if len(named) == 1:
        return tuple(phase for phase in found if phase in named or phase == "epilogue")
    return found
