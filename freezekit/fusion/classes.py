"""How a module gets another forward and stays what it was.

Its class becomes a subclass of its class that differs in `forward` alone: attributes, state_dict, names, hooks and
isinstance are untouched, and nothing is stored on the instance. A plan holds for what its forward was seen to depend
on; where that has changed (a layer was appended, a flag was set), a new plan is made at the next call.

deepcopy gives a fused copy. pickle writes the stock class, so that what was saved loads without freezekit.
"""

from __future__ import annotations

import copy
import copyreg
from functools import wraps
from typing import Any

import torch
from torch import nn

from freezekit.fusion.plan import Plan, make_plan
from freezekit.fusion.tracer import ORIGINAL, original_class

_NEW_OBJECT = getattr(copyreg, "__newobj__")  # noqa: B009, the type stubs lack it
_PLAN = "_freezekit_plan"

# By class: plans of its instances. Modules of one structure share one.
_known: dict[type[nn.Module], list[type[nn.Module]]] = {}


def plan_of(module: nn.Module) -> Plan | None:
    """The plan that a module runs; None if it is not fused."""
    return getattr(type(module), _PLAN, None)


def fuse_module(module: nn.Module, plan: Plan | None = None) -> Plan:
    """Gives a module a plan, or one that fits it as it is now."""
    kind = original_class(module)
    plan = plan or make_plan(module, kind)
    for known in _known.setdefault(kind, []):
        if getattr(known, _PLAN).key == plan.key:
            module.__class__ = known
            return plan
    made = _subclass(kind, plan)
    _known[kind].append(made)
    module.__class__ = made
    return plan


def unfuse_module(module: nn.Module) -> None:
    if plan_of(module) is not None:
        module.__class__ = original_class(module)


def _subclass(kind: type[nn.Module], plan: Plan) -> type[nn.Module]:
    own_forward = kind.forward

    @wraps(own_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kind.forward is own_forward and plan.holds(self):
            return plan.run(self, *args, **kwargs)
        if torch.compiler.is_compiling() or kind.forward is not own_forward:
            return kind.forward(self, *args, **kwargs)
        return fuse_module(self).run(self, *args, **kwargs)

    def reduce_as_stock(self: nn.Module, protocol: Any) -> Any:
        return _stock_reduce(self, kind, protocol)

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        return _deepcopy(self, kind, memo)

    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "forward": forward,
        "__reduce_ex__": reduce_as_stock,
        "__deepcopy__": deepcopy,
        ORIGINAL: kind,
        _PLAN: plan,
    }
    return type(kind)(kind.__name__, (kind,), body)  # type: ignore[misc]


def _stock_reduce(module: nn.Module, kind: type[nn.Module], protocol: Any) -> Any:
    """What the module's own class would answer."""
    mine = type(module)
    parts = list(kind.__reduce_ex__(module, protocol))
    parts[1] = tuple(kind if part is mine else part for part in parts[1])
    if parts[0] is _NEW_OBJECT and len(parts[1]) == 1:
        # pickle takes this one for the object's present class alone.
        parts[:2] = copyreg._reconstructor, (kind, object, None)  # type: ignore[attr-defined]
    return tuple(parts)


def _deepcopy(module: nn.Module, kind: type[nn.Module], memo: dict[int, Any]) -> nn.Module:
    own = getattr(kind, "__deepcopy__", None)
    if own is not None:
        result = own(module, memo)
    else:
        make, args, state, *_ = _stock_reduce(module, kind, 4)
        result = make(*copy.deepcopy(args, memo))
        memo[id(module)] = result
        state = copy.deepcopy(state, memo)
        if hasattr(result, "__setstate__"):
            result.__setstate__(state)
        else:
            result.__dict__.update(state)
    if type(result) is kind:
        result.__class__ = type(module)
    return result
