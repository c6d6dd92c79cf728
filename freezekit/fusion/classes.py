"""How a module gets other methods and stays what it was.

Its class becomes a subclass of its class that differs in `forward`, and in the methods that it calls, alone:
attributes, state_dict, names, hooks and isinstance are untouched, and nothing is stored on the instance. deepcopy
gives a fused copy. pickle writes the stock class, so that what was saved loads without freezekit.
"""

import copy
import copyreg
from collections.abc import Callable
from functools import wraps
from operator import methodcaller
from types import FunctionType
from typing import Any

from torch import fx, nn

from freezekit.fusion.plan import FusionPlan
from freezekit.fusion.sequences import ORIGINAL, original_class

_NEW_OBJECT = getattr(copyreg, "__newobj__")  # noqa: B009, the type stubs lack it
_PLAN = "_freezekit_plan"


def plan_of(module: nn.Module) -> FusionPlan | None:
    """The plan that a module runs; None if it is not fused."""
    return getattr(type(module), _PLAN, None)


def fuse_module(module: nn.Module, plan: FusionPlan) -> None:
    """Gives a module the methods of a plan."""
    kind = original_class(module)
    # Modules of one structure share a class.
    made = (known for known in type.__subclasses__(kind) if _PLAN in vars(known))
    same = (known for known in made if getattr(known, _PLAN).key == plan.key)
    module.__class__ = next(same, None) or _subclass(kind, plan)


def unfuse_module(module: nn.Module) -> None:
    if is_ours(module):
        module.__class__ = original_class(module)


def is_ours(module: nn.Module) -> bool:
    """Whether a module's class was made here, and is not a class that others derived from one."""
    return _PLAN in vars(type(module))


def _subclass(kind: type[nn.Module], plan: FusionPlan) -> type[nn.Module]:
    body: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": lambda self, protocol: _stock_reduce(self, kind, protocol),
        "__deepcopy__": lambda self, memo: _deepcopy(self, kind, memo),
        ORIGINAL: kind,
        _PLAN: plan,
    }
    if issubclass(kind, fx.GraphModule):
        body["recompile"] = _recompile
    methods = {name: _method(kind, name, *pair) for name, pair in plan.methods.items()}
    return type(kind)(kind.__name__, (kind,), body | methods)  # type: ignore[misc]


def _recompile(self: fx.GraphModule) -> Any:
    """Writes a graph's forward anew, which torch does by giving it to the module's class."""
    unfuse_module(self)
    return self.recompile()


def _method(kind: type[nn.Module], name: str, own: FunctionType, made: FunctionType) -> Callable[..., Any]:
    """What was made of a class's method, for as long as the class has that method as it was."""
    code = own.__code__

    @wraps(own)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        now = getattr(kind, name)
        same = (
            now is own
            and own.__code__ is code
            and own.__defaults__ is made.__defaults__
            and own.__kwdefaults__ is made.__kwdefaults__
        )
        return (made if same else now)(self, *args, **kwargs)

    return method


def _stock_reduce(module: nn.Module, kind: type[nn.Module], protocol: Any) -> Any:
    """What the module's own class would answer."""
    mine = type(module)
    parts = list(kind.__reduce_ex__(module, protocol))
    parts[0] = kind if parts[0] is mine else parts[0]
    parts[1] = tuple(kind if part is mine else part for part in parts[1])
    # pickle takes this one for the object's present class alone.
    if parts[0] is _NEW_OBJECT and len(parts[1]) == 1:
        parts[:2] = copyreg._reconstructor, (kind, object, None)  # type: ignore[attr-defined]
    elif parts[0] is _NEW_OBJECT:
        parts[:2] = methodcaller("__new__", *parts[1]), (kind,)
    return tuple(parts)


def _deepcopy(module: nn.Module, kind: type[nn.Module], memo: dict[int, Any]) -> nn.Module:
    own = getattr(kind, "__deepcopy__", None)
    if own is not None:
        result = own(module, memo)
    elif not is_ours(module):
        # A class that others made of it, as torch does for parametrizations, whose modules refuse to be reduced.
        result = memo[id(module)] = module.__new__(type(module))
        result.__dict__.update(copy.deepcopy(vars(module), memo))
    else:
        make, args, *rest = _stock_reduce(module, kind, 4)
        result = make(*copy.deepcopy(args, memo))
        memo[id(module)] = result
        state = copy.deepcopy(rest[0], memo) if rest else None
        if state is not None and hasattr(result, "__setstate__"):
            result.__setstate__(state)
        elif state is not None:
            result.__dict__.update(state)
    if type(result) is kind:
        result.__class__ = type(module)
    return result
