"""Objects that stand in a module's dictionary for one of its methods, and the copies of such a module.

An object in the dictionary is called without the module that it is called for, so it holds its module. A shallow copy
takes over the dictionary, and with it an object that would act on the original. So `copyreg`, which `copy` and `pickle`
both ask, has an entry for the classes of such modules: it is given the module that is copied, and hands out an object
that becomes the copy's. A module without one is reduced as ever.
"""

import copy
import copyreg
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized


class StandIn:
    """Stands in for a method of ``module``, under the name of that method.

    Attributes:
        name: that of the method.
    """

    name: str
    _source = 0  # id of the module that this was copied from

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        if not is_parametrized(module):  # a class of one module, which refuses to be reduced
            copyreg.dispatch_table.setdefault(type(module), _reduce)

    def duplicate(self) -> Any:
        """One with the same attributes; `copy.copy` gives what a file is to hold."""
        made = object.__new__(type(self))
        made.__dict__.update(vars(self))
        return made

    def bind(self, module: nn.Module) -> None:
        """Become the one of a copy, which is about to be filled."""
        self.module = module

    def follow(self, memo: dict[int, Any]) -> None:
        """Replace what else this holds by the copies of a deep copy, of which ``memo`` knows some."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if memo.get(self._source) is self.module:  # made by `_reduce`, and the copy's already
            self.follow(memo)
            return self
        twin = memo[id(self)] = self.duplicate()
        twin.bind(copy.deepcopy(self.module, memo))
        twin.follow(memo)
        return twin


class _Maker:
    """Makes the empty copy of a module, and binds what is to stand in it.

    To a pickler it is `copyreg.__newobj__`: PEP 307 knows that by its name, and old protocols get what is made of it.
    """

    __name__ = "__newobj__"

    def __init__(self, stand_in: StandIn) -> None:
        self.stand_in = stand_in

    def __call__(self, kind: type[nn.Module], *args: Any) -> Any:
        made = copyreg.__newobj__(kind, *args)  # type: ignore[attr-defined]
        self.stand_in.bind(made)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (copyreg.__newobj__,)  # type: ignore[attr-defined]


def _reduce(module: nn.Module) -> Any:
    reduced = module.__reduce_ex__(4)
    if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return reduced
    _, args, state, *rest = reduced
    found = [value for value in state.values() if isinstance(value, StandIn)] if isinstance(state, dict) else []
    if len(found) != 1:
        return reduced
    own = found[0].duplicate()
    own.module, own._source = module, id(module)  # the module until there is a copy: a pickler makes none
    return _Maker(own), args, {**state, own.name: own}, *rest
