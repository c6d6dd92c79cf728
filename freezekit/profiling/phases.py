"""Which part of a convolution an operator or a kernel computes: fprop, dgrad, wgrad, db or epilogue."""

from __future__ import annotations

import re
from collections.abc import Iterator

from freezekit.profiling.events import Event

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
