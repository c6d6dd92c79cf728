"""What a rewritten forward calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from freezekit.fusion import block
from freezekit.fusion.block import inner_layout, outer_layout
from freezekit.fusion.layers import ACTIVATION_CALLS, is_watched
from freezekit.fusion.sequences import has_shape, is_still

Before = Tensor | bool | None


def fused(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module | None = None,
    activation: object = None,
    residual: Tensor | None = None,
    before: Before = None,
    inner: bool = False,
) -> Tensor | None:
    """activation(norm(conv(x)) + residual) as one operator; None where the layers have to run one by one.

    Args:
        x: (N, C, H, W).
        conv, norm, activation: the layers; norm and activation may be absent, activation may be a function or the
            name of a method.
        residual: of the size of the result, or None.
        before: what the layout of the result follows from where x lies in a layout of its own, see `outer_layout`.
        inner: whether blocks alone read the result, so that it may lie in a layout of its own.
    """
    kind = activation if activation is None or isinstance(activation, nn.Module) else ACTIVATION_CALLS[activation]
    if not block._runs_fused(x, conv, norm, kind, residual):
        return None
    layout = _layout(x, conv, before, inner)
    return block._decided(block._frozen, x, conv, norm, kind, residual, layout)[0]


def shared(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module | None = None,
    activation: object = None,
    residual: Tensor | None = None,
    before: Before = None,
    inner: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """As `fused`; also gives x, for blocks that read it after: their gradients are added inside this one's dgrad."""
    if torch.compiler.is_compiling():
        y = fused(x, conv, norm, activation, residual, before, inner)
        return None if y is None else (y, x)
    kind = activation if activation is None or isinstance(activation, nn.Module) else ACTIVATION_CALLS[activation]
    if not block._runs_fused(x, conv, norm, kind, residual):
        return None
    return block._decided(block._shared, x, conv, norm, kind, residual, _layout(x, conv, before, inner))


def _layout(x: Tensor, conv: nn.Module, before: Before, inner: bool) -> bool | None:
    if inner:
        return inner_layout(x)
    return None if before is None else outer_layout(before, conv)


def outer(x: Tensor, layout: bool | None) -> Tensor:
    """A result that lay in a layout of its own, as torch's layers would have left it."""
    if layout is None:
        return x
    return x.contiguous(memory_format=torch.channels_last if layout else torch.contiguous_format)


def is_identity(module: nn.Module | None) -> bool:
    return type(module) is nn.Identity and not is_watched(module)


# By their names in rewritten forwards, less the prefix.
NAMES = {
    "fused": fused,
    "shared": shared,
    "outer": outer,
    "outer_layout": outer_layout,
    "is_still": is_still,
    "has_shape": has_shape,
    "own_forward": nn.Sequential.forward,
    "is_identity": is_identity,
    "torch_add": torch.add,
}
