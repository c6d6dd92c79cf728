"""Gradients that `freeze` drops before an optimizer has stepped them, where ``requires_grad_(False)`` would keep them.

A frozen weight cannot move because it has no gradient. Where a layer is frozen for good, nothing is lost by that. Where
a discriminator is frozen for the generator's step only, gradients that wait for the end of an accumulation are.

So parameters that `unfreeze` released *wait*, until a step of an optimizer has met them with a gradient, or something
else has written to them. `freeze` of one that waits and has a gradient notes it as lost, `Frozen.restore` gives the
gradient back and takes the note away, and the next `unfreeze` warns. A step that meets a parameter without a gradient
does not end the wait: its gradient may be what was lost. What is frozen and released for the first time cannot be told
apart from a step that was made before, so the first loss goes unseen.

Notes are kept by module and name: a weak reference to a parameter would stand in the way of ``swap_tensors``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook

from freezekit.freezing.bits import local
from freezekit.freezing.result import Frozen

_waiting: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()  # -> name -> version when it was released
_lost: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class GradientWarning(UserWarning):
    """Gradients that no optimizer has stepped were dropped for good."""


def note_released(model: nn.Module, params: Collection[nn.Parameter]) -> None:
    """Have ``params`` of ``model``, which `unfreeze` released, wait for a step."""
    _watch_steps()
    for module, name, param in _owners(model, params):
        if not is_lazy(param):
            _wait(module, name, _version(param))


def note_dropped(result: Frozen, model: nn.Module, params: Collection[nn.Parameter]) -> None:
    """Note which gradients of ``params``, which `freeze` is about to drop, wait for a step."""
    unstepped = []
    for module, name, param in _owners(model, params) if _waiting else ():
        version = _waiting.get(module, {}).pop(name, None)
        if version is not None:
            result.on_restore(partial(_wait, module, name, version))
            if param.grad is not None and _version(param) == version:
                unstepped.append((module, name, param))
    if _count([param for *_, param in unstepped]):
        for module, name, _ in unstepped:
            _lost.setdefault(module, set()).add(name)
            result.on_restore(partial(_lost[module].discard, name))


def tell_of_lost(model: nn.Module, params: Collection[nn.Parameter]) -> None:
    """Warn the caller of `unfreeze` of gradients of ``params`` that `freeze` dropped and nothing gave back."""
    lost = []
    for module, name, param in _owners(model, params) if _lost else ():
        if name in _lost.get(module, ()):
            _lost[module].discard(name)
            lost.append(param)
    if lost:
        _warn(f"unfreeze: freeze() had dropped gradients of {_named(model, lost)} that no optimizer has stepped, and "
              "they are lost;\nstep before freeze(), or write `with freeze(...):`, which gives them back at the end of "
              "the block", stacklevel=4)  # fmt: skip


def tell_of_end(model: nn.Module, params: Collection[nn.Parameter]) -> None:
    """Warn where a block of `unfreeze` is about to drop gradients of ``params``."""
    unstepped = []
    for module, name, param in _owners(model, params) if _waiting else ():
        version = _waiting.get(module, {}).pop(name, None)
        if version is not None and param.grad is not None and _version(param) == version:
            unstepped.append(param)
    if _count(unstepped):
        _warn(f"unfreeze: the block ends and drops gradients of {_named(model, unstepped)} that no optimizer has "
              "stepped;\nstep within the block", stacklevel=8)  # fmt: skip


@cache
def _watch_steps() -> None:
    register_optimizer_step_post_hook(_end_waits)


def _end_waits(optimizer: Any, *step: Any) -> None:
    """A step has met what it holds: what of that has a gradient waits no longer."""
    if torch.compiler.is_compiling() or not _waiting:
        return
    met = [(module, name, module._parameters.get(name)) for module, names in [*_waiting.items()] for name in names]
    met = [(module, name, param) for module, name, param in met if param is None or param.grad is not None]
    if met:
        stepped = {id(param) for group in getattr(optimizer, "param_groups", ()) for param in group["params"]}
        for module, name, param in met:
            if param is None or id(param) in stepped:
                del _waiting[module][name]
                if not _waiting[module]:
                    del _waiting[module]


def _owners(model: nn.Module, params: Collection[nn.Parameter]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    wanted = {id(param) for param in params}
    for module in model.modules() if wanted else ():
        for name, param in module._parameters.items():
            if param is not None and id(param) in wanted:
                yield module, name, param


def _wait(module: nn.Module, name: str, version: int) -> None:
    _waiting.setdefault(module, {})[name] = version


def _version(param: torch.Tensor) -> int:
    return -1 if param.is_inference() else param._version


def _count(params: list[nn.Parameter]) -> bool:
    """Whether gradients of ``params`` would move something: after an overflow a scaler skips the step, and means to."""
    total = 0.0
    for param in params:
        grad = param.grad
        if grad is not None and not param.is_meta:
            grad = local(grad).detach()
            total += float((grad._values() if grad.is_sparse else grad).abs().sum())
    return 0.0 < total < math.inf


def _named(model: nn.Module, params: list[nn.Parameter]) -> str:
    names = {id(param): name for name, param in model.named_parameters()}
    return repr(names[id(params[0])]) + (f" and {len(params) - 1} more" if len(params) > 1 else "")


def _warn(message: str, stacklevel: int) -> None:
    warnings.warn(message, GradientWarning, stacklevel=stacklevel)
