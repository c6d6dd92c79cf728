"""Which ``train()`` of a module is running around a call: who asks a layer for a mode.

Networks that fine-tune keep norms in eval mode by a ``train()`` of their own (mmdet's and mmseg's ResNet with
``norm_eval``): it calls ``eval()`` of each while the network is put into train mode. A trainer that restores modes
which it has recorded calls the same ``eval()``, of a layer that was in eval mode only because `freeze` held it. Nothing
but the caller tells the two from each other.
"""

import inspect
import sys
from types import CodeType, FrameType

from torch import nn


def trains_around() -> list[tuple[nn.Module, bool]]:
    """The modules whose ``train()`` is running, the innermost first, and the mode that each was asked for."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        call = _call_in(frame) if frame.f_code.co_name == "train" else None
        if call is not None:
            found.append(call)
        frame = frame.f_back
    return found


def _call_in(frame: FrameType) -> tuple[nn.Module, bool] | None:
    """Module and mode; None where that is not the ``train`` method of a module, but a user's loop, say."""
    code, values = frame.f_code, frame.f_locals
    names = code.co_varnames[: code.co_argcount]
    module = values.get(names[0]) if names else None
    if not isinstance(module, nn.Module) or not _is_method(module, code):
        return None
    mode = values.get(names[1]) if len(names) > 1 else module.training  # of *args: what it has handed on
    return (module, mode) if isinstance(mode, bool) else None


def _is_method(module: nn.Module, code: CodeType) -> bool:
    methods = [vars(kind)["train"] for kind in type(module).__mro__ if "train" in vars(kind)]
    return any(getattr(inspect.unwrap(method), "__code__", None) is code for method in methods)
