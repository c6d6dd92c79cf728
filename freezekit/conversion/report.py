"""What of a model is freezekit's, what `convert` would swap, and what it leaves alone, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from freezekit._arguments import check_module
from freezekit._inputs import arguments
from freezekit.conversion.calls import functional_calls
from freezekit.conversion.swap import SWAPS, reason_to_leave, stock_base
from freezekit.fusion.identity import classes_read

_ENABLE = "freezekit.enable() reaches the operators that it calls"
# Layers that call operators of those kinds.
_CALLING = (nn.modules.pooling._LPPoolNd, nn.LocalResponseNorm)
# Layers whose gradient is dy or nothing, but for a factor.
_MASKING = (nn.Softshrink, nn.Hardshrink, nn.Hardsigmoid)
_INDEXED = (nn.modules.pooling._AdaptiveMaxPoolNd, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


@dataclass(frozen=True)
class LayerReport:
    """One layer of a conversion report, or one call of a function in a forward.

    Attributes:
        name: the layer's name in the model, or the module whose forward makes the call; "" is the model itself.
        layer: its class's name; of a call, the function as it is written.
        status: "freezekit" (is one of freezekit's), "stock" (`convert` would swap it), "left alone", or "call".
        reason: why a layer is left alone or keeps its input all the same, or what to call instead; "" otherwise.
        where: of a call, "file:line"; "" otherwise.
        bytes_kept: of a call, what autograd kept for it in this forward, parameters aside; None otherwise.
    """

    name: str
    layer: str
    status: str
    reason: str = ""
    where: str = field(default="", repr=False)
    bytes_kept: int | None = field(default=None, repr=False)


def conversion_report(model: nn.Module, inputs: Any = None) -> list[LayerReport]:
    """What of `model` is freezekit's, what `convert` would swap, and what it leaves alone, and why.

    Lists layers of the kinds that freezekit replaces, their subclasses, and other layers that do the same; a shared
    layer is listed once. Calls of functions cannot be swapped: with `inputs`, the model runs once and the report also
    names those of `torch.nn.functional` and the like that keep more than freezekit's would, with their place and what
    they kept.

    Args:
        model: any module.
        inputs: None, or the arguments of one forward: a tensor, a tuple or list of positional arguments, or a mapping
            of keyword arguments. A copy of the model runs it, in the model's present mode and with gradients recorded.

    >>> from torch import nn
    >>> import freezekit as fk
    >>> fk.conversion.conversion_report(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid()))
    [LayerReport(name='0', layer='Conv2d', status='stock', reason='')]
    """
    check_module(model)
    rows = []
    looked_at = classes_read(model)
    for name, module in model.named_modules():
        base = stock_base(module)
        layer = type(module).__name__
        if base is None:
            if reason := _reason_of_a_relative(module):
                rows.append(LayerReport(name, layer, "left alone", reason))
        elif isinstance(module, SWAPS[base]):
            rows.append(LayerReport(name, layer, "freezekit", _what_it_still_keeps(module)))
        elif reason := looked_at.get(id(module)) or reason_to_leave(module, base):
            rows.append(LayerReport(name, layer, "left alone", f"{reason}; {_ENABLE}"))
        else:
            rows.append(LayerReport(name, layer, "stock"))
    if inputs is not None:
        for call in functional_calls(model, arguments(inputs)):
            times = f" ({call.count} times)" if call.count > 1 else ""
            reason = f"a call{times} that convert cannot swap: write {call.instead}"
            rows.append(LayerReport(call.module, call.function, "call", reason, call.where, call.bytes_kept))
    return rows


def _reason_of_a_relative(module: nn.Module) -> str:
    """Why a layer like one of freezekit's is left alone, though it keeps more; "" for any other layer."""
    kind = f"freezekit has no layer for {type(module).__module__}.{type(module).__qualname__}"
    leaky_relu = isinstance(module, nn.RReLU) and not module.training
    if leaky_relu or isinstance(module, (nn.Threshold, nn.modules.batchnorm._NormBase, *_CALLING)):
        return f"{kind}; {_ENABLE}"
    if isinstance(module, _MASKING) or (isinstance(module, nn.AlphaDropout) and module.training):
        return f"{kind}: it keeps a tensor as large as its input, of which its gradient reads a bit per element"
    if isinstance(module, _INDEXED):
        return f"{kind}: it keeps its input and int64 indices, of which max pools over equal windows keep a byte"
    return ""


def _what_it_still_keeps(module: nn.Module) -> str:
    """Why a frozen layer keeps its input all the same: its formula reads it."""
    parameters = list(module.parameters(recurse=False))
    if isinstance(module, nn.PReLU) and module.weight.requires_grad:
        return "its slope learns: the gradient reads its input, which is kept"
    if any(p.requires_grad for p in parameters):
        return ""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        return "normalises by batch: its gradient reads its input, which is kept, frozen or not"
    own_statistics = isinstance(module, nn.modules.instancenorm._InstanceNorm) and (
        module.training or not module.track_running_stats
    )
    if own_statistics or isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return "normalises by its input: the gradient reads it, so it is kept, frozen or not"
    return ""
