"""Gradients that `freeze` drops before an optimizer has stepped them, where ``requires_grad_(False)`` would keep them.

A frozen weight cannot move because it has no gradient. Where a layer is frozen for good, nothing is lost by that. Where
a discriminator is frozen for the generator's step only, gradients that wait for the end of an accumulation are.

So parameters that `unfreeze` released *wait*, until a step of an optimizer has met them with a gradient, or something
else has written to them. `freeze` of one that waits and has a gradient notes it as lost, `Frozen.restore` gives the
gradient back and takes the note away, and the next `unfreeze` warns. A step that meets a parameter without a gradient
does not end the wait: its gradient may be what was lost.

What is frozen for the first time does not wait, and its gradient may have been stepped before. There a step warns, if
it comes after the release and has no gradient at all, while `freeze` had dropped some: it does nothing.

Notes are kept by module and name: a weak reference to a parameter would stand in the way of ``swap_tensors``.
"""

import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook

from freezekit._arguments import brief
from freezekit.freezing.bits import local
from freezekit.freezing.patterns import Selection
from freezekit.freezing.result import Frozen


@dataclass
class _Wait:
    """Of a parameter that was released: its name in the model, its version then, and whether `freeze` had dropped a
    gradient that may have been stepped."""

    name: str
    version: int
    dropped: bool


_waiting: WeakKeyDictionary[nn.Module, dict[str, _Wait]] = WeakKeyDictionary()
# -> name -> whether the gradient that `freeze` dropped is known to be lost
_dropped: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


_CURE = "step before freeze(), or write `with freeze(...):`, which gives them back at the end of the block"
T = TypeVar("T")


class GradientWarning(UserWarning):
    """Gradients that no optimizer has stepped were dropped for good."""


def note_dropped(result: Frozen, selection: Selection) -> None:
    """Note which parameters have a gradient, which `freeze` is about to drop, and which of these wait for a step."""
    unstepped = []
    params = selection.params.values()
    noted = params if _waiting else [param for param in params if param.grad is not None]
    for module, name, param in owners(selection, noted):
        wait = _take(_waiting, module, name)
        if wait is not None:
            result.on_restore(partial(_keep, _waiting, module, name, wait))
        if param.grad is not None:
            _keep(_dropped, module, name, False)
            result.on_restore(partial(_take, _dropped, module, name))
            if wait is not None and _version(param) == wait.version:
                unstepped.append((module, name, param))
    if _count([param for *_, param in unstepped]):
        for module, name, _ in unstepped:
            _dropped[module][name] = True


def note_released(selection: Selection, params: Collection[nn.Parameter]) -> None:
    """Have ``params``, which `unfreeze` released, wait for a step.

    Warns the caller of `unfreeze` of gradients that `freeze` dropped and nothing gave back.
    """
    _watch_steps()
    lost = []
    for module, name, param in owners(selection, params):
        known = _take(_dropped, module, name)
        first = selection.names[id(param)][0]
        if not is_lazy(param):
            _keep(_waiting, module, name, _Wait(first, _version(param), known is False))
        if known:
            lost.append(first)
    if lost:
        _warn(
            f"unfreeze: freeze() had dropped gradients of {_listed(lost)} that no optimizer has stepped, and they are "
            f"lost;\n{_CURE}",
            stacklevel=4,
        )


def tell_of_end(selection: Selection, params: Collection[nn.Parameter]) -> None:
    """Warn where a block of `unfreeze` is about to drop gradients of ``params``."""
    unstepped, names = [], []
    for module, name, param in owners(selection, params):
        wait = _take(_waiting, module, name)
        if wait is not None and param.grad is not None and _version(param) == wait.version:
            unstepped.append(param)
            names.append(wait.name)
    if _count(unstepped):
        _warn(
            f"unfreeze: the block ends and drops gradients of {_listed(names)} that no optimizer has stepped;\n"
            "step within the block",
            stacklevel=8,
        )


@cache
def _watch_steps() -> None:
    register_optimizer_step_post_hook(_end_waits)


def _end_waits(optimizer: Any, *step: Any) -> None:
    """A step has met what it holds: what of that has a gradient waits no longer. One without any is told of."""
    if torch.compiler.is_compiling() or not _waiting:
        return
    held = {id(param): param for group in getattr(optimizer, "param_groups", ()) for param in group["params"]}
    idle = all(param.grad is None for param in held.values())
    missed = []
    for module, waits in [*_waiting.items()]:
        for name, wait in [*waits.items()]:
            param = dict(module._parameters.items()).get(name)  # a ScriptModule has no dictionary of them
            if param is None or (id(param) in held and param.grad is not None):
                _take(_waiting, module, name)
            elif id(param) in held and wait.dropped:
                wait.dropped = False
                missed += [wait.name] if idle else []
    if missed:
        _warn(
            f"{type(optimizer).__name__}.step: there is no gradient to step by, since freeze() had dropped those of "
            f"{_listed(missed)};\n{_CURE}",
            stacklevel=4,
        )


def owners(selection: Selection, params: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Module, name there and parameter of each place where one of ``params`` is."""
    wanted = {id(param) for param in params}
    for module in selection.modules if wanted else ():
        for name, param in module._parameters.items():
            if param is not None and id(param) in wanted:
                yield module, name, param


def _keep(notes: WeakKeyDictionary[nn.Module, dict[str, T]], module: nn.Module, name: str, value: T) -> None:
    notes.setdefault(module, {})[name] = value


def _take(notes: WeakKeyDictionary[nn.Module, dict[str, T]], module: nn.Module, name: str) -> T | None:
    """The note of a parameter, which is gone then."""
    own = notes.get(module, {})
    value = own.pop(name, None)
    if not own:
        notes.pop(module, None)
    return value


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


def _listed(names: list[str]) -> str:
    return brief(list(map(repr, dict.fromkeys(names))))  # a parameter of two modules has two notes


def _warn(message: str, stacklevel: int) -> None:
    warnings.warn(message, GradientWarning, stacklevel=stacklevel)
