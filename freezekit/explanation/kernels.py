"""The kernel column of `explain`: what computes a layer, and why; of a convolution as `_C.select` tells it."""

from typing import Any

import torch
from torch import nn
from torch._prims_common import suggest_memory_format

import freezekit._C as _C
from freezekit import nn as layers
from freezekit._tf32 import allows_tf32
from freezekit.backends import WITHOUT_KERNELS, current_backend, demands_kernels
from freezekit.conversion import SWAPS
from freezekit.explanation.record import Call
from freezekit.nn import FreezableConv2d

WITHOUT_CHOICE = "always the same"  # of a layer without kernels of its own
_WITHOUT_KERNELS = tuple(getattr(layers, name) for names in WITHOUT_KERNELS.values() for name in names)

OPERATORS = ("conv2d", "conv2d_dgrad", "conv2d_wgrad")
NATIVE_DTYPES = ("float32", "float64", "float16", "bfloat16")


def kernels_of(call: Call, has_device: bool) -> str:
    """What computes the call's operators under the current backend; "" for what is not a layer of freezekit's.

    Under "auto" that is "aten" where nothing was measured, else each operator with what was taken and why. A model that
    is on no device is answered for as on `_C.select`'s own default, a GPU.
    """
    if call.fallback:
        return f"torch's own, {call.fallback}"
    conv, backend = call.module, current_backend()
    if isinstance(conv, _WITHOUT_KERNELS):
        return WITHOUT_CHOICE
    if not isinstance(conv, FreezableConv2d):
        return f"{backend}, as demanded" if isinstance(conv, tuple(SWAPS.values())) and demands_kernels() else ""
    if backend == "aten":
        return "aten, as demanded"
    choices = _choices(call, conv, conv.weight.device if has_device else torch.device("meta"))
    if not choices:
        return "aten" if backend == "auto" else f"{backend}, as demanded"
    if backend != "auto":
        return "; ".join("{kernel} ({reason})".format(**choice) for choice in choices.values())
    if all(choice["auto_reason"] == _C.choices.rule for choice in choices.values()):
        return "aten"
    return "; ".join(
        f"{operator}: {'aten' if choice['auto'] == 'aten' else choice['auto_kernel']} ({choice['auto_reason']})"
        for operator, choice in choices.items()
    )


def _choices(call: Call, conv: nn.Conv2d, device: torch.device) -> dict[str, dict[str, Any]]:
    """`_C.select`'s answer for each operator; empty where it cannot be asked."""
    dtype = str(conv.weight.dtype).removeprefix("torch.")
    if dtype not in NATIVE_DTYPES or isinstance(conv.padding, str) or len(call.inputs) != 4:
        return {}
    size, padding = call.inputs, conv.padding
    if conv.padding_mode != "zeros":
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        size, padding = (*size[:2], size[2] + top + bottom, size[3] + left + right), (0, 0)
    settings = (conv.stride, padding, conv.dilation, conv.groups)
    channels_last = call.channels_last or suggest_memory_format(conv.weight) == torch.channels_last
    target = {**_target(device), "channels_last": channels_last}
    return {op: _C.select(op, dtype, size, tuple(conv.weight.shape), *settings, **target) for op in OPERATORS}


def _target(device: torch.device) -> dict[str, Any]:
    """The device as `_C.select` takes it; for a GPU that is not here it has its own default."""
    known: dict[str, Any] = {"device": "cpu" if device.type == "cpu" else "cuda", "allow_tf32": allows_tf32()}
    if device.type == "cpu":
        known.update(sm=80, sm_count=4)  # as what the emulator is
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known["sm"] = 10 * properties.major + properties.minor
        known["sm_count"] = properties.multi_processor_count
    return known
