"""What a rewritten forward calls.

A layer or a residual that a forward has is never None for such a call: where it is None at the time, the layers are
to say so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from freezekit._twin import is_plain
from freezekit.fusion import block
from freezekit.fusion.layers import CONVS, function_kind, is_watched
from freezekit.fusion.norms import has_activation
from freezekit.fusion.sequences import children_of_list, children_of_sequence, has_shape

ABSENT = object()  # a layer that the block does not have


def fused(
    x: Any,
    conv: Any,
    norm: Any = ABSENT,
    activation: Any = ABSENT,
    residual: Any = ABSENT,
    owns: bool = False,
) -> Tensor | None:
    """activation(norm(conv(x)) + residual) as one operator; None where the layers have to run one by one.

    Args:
        x: (N, C, H, W).
        conv, norm, activation: the layers, or what takes their places; an activation may be a function or the name
            of a method.
        residual: what is added, of the size of the result.
        owns: whether the norm has an activation of its own, which is part of the block or runs behind it.
    """
    parts = _parts(conv, norm, activation, residual, owns)
    return None if parts is None else block.run(x, conv, *parts)


def shared(
    x: Any,
    conv: Any,
    norm: Any = ABSENT,
    activation: Any = ABSENT,
    residual: Any = ABSENT,
    owns: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """As `fused`; also gives x, for blocks that read it after: their gradients are added inside this one's dgrad."""
    if torch.compiler.is_compiling():
        y = fused(x, conv, norm, activation, residual, owns)
        return None if y is None else (y, x)
    parts = _parts(conv, norm, activation, residual, owns)
    return None if parts is None else block.run(x, conv, *parts, shares=True)


def _parts(conv: Any, norm: Any, activation: Any, residual: Any, owns: bool) -> tuple[Any, Any, Any] | None:
    """Norm, activation and residual as the operator takes them; None where what is there is not what was expected."""
    if norm is None or activation is None or residual is None or type(conv) not in CONVS:
        return None
    if residual is not ABSENT and not is_plain(residual):
        return None
    if norm is not ABSENT and has_activation(norm) is not owns:
        return None
    if not isinstance(activation, nn.Module) and activation is not ABSENT:
        activation = function_kind(activation)
        if activation is None:
            return None
    norm, activation, residual = (None if part is ABSENT else part for part in (norm, activation, residual))
    return norm, activation, residual


def is_identity(module: Any) -> bool:
    return type(module) is nn.Identity and not is_watched(module)


def drops_nothing(norm: Any) -> bool:
    """Whether a norm with an activation of its own passes all on to it."""
    if not isinstance(norm, nn.Module) or not has_activation(norm):
        return False
    return "drop" not in norm._modules or is_identity(norm._modules["drop"])


# By their names in rewritten forwards, less the prefix.
NAMES = {
    "absent": ABSENT,
    "fused": fused,
    "shared": shared,
    "children_of_list": children_of_list,
    "children_of_sequence": children_of_sequence,
    "has_shape": has_shape,
    "own_forward": nn.Sequential.forward,
    "is_identity": is_identity,
    "drops_nothing": drops_nothing,
    "torch_add": torch.add,
}
