"""How the arguments of a forward pass are handed over: one rule for every function that takes `inputs`."""

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

# Not looked into for tensors that a call takes or returns.
_CLOSED = (nn.Module, Optimizer, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, str, bytes)
_DEEP = 4  # objects in each other; one may hold half of the program


class Arguments(NamedTuple):
    """Positional and keyword arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self, function: Callable[..., Any]) -> Any:
        """Calls a function, or a module, with them."""
        return function(*self.args, **self.kwargs)


def arguments(inputs: Any) -> Arguments:
    """The arguments that `inputs` stands for.

    Args:
        inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Raises:
        TypeError: for anything else, and for a mapping whose keys are not names.

    >>> arguments((1, "same"))
    Arguments(args=(1, 'same'), kwargs={})
    >>> arguments({"x": 1}).call(lambda x: x + 1)
    2
    """
    if isinstance(inputs, Tensor):
        return Arguments((inputs,), {})
    if isinstance(inputs, (tuple, list)):
        return Arguments(tuple(inputs), {})
    if isinstance(inputs, Mapping):
        for key in inputs:
            if not isinstance(key, str):
                raise TypeError(f"inputs: a mapping holds keyword arguments by name, got the key {key!r}")
        return Arguments((), dict(inputs))
    raise TypeError(
        "inputs must be a tensor, a tuple or list of positional arguments or a mapping of keyword arguments, "
        f"got {type(inputs).__name__}; put a single argument of another type in a tuple"
    )


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in what a call takes or returns, in order: in containers, dataclasses and objects of any class.

    >>> from types import SimpleNamespace
    >>> from torch import ones
    >>> [t.shape[0] for t in tensors_in([ones(1), SimpleNamespace(logits=ones(2), parts={"x": ones(3)})])]
    [1, 2, 3]
    """
    found: list[Tensor] = []
    _collect(value, found, set(), _DEEP)
    return found


def _collect(value: Any, found: list[Tensor], seen: set[int], deep: int) -> None:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif deep and id(leaf) not in seen and (content := _content_of(leaf)):
            seen.add(id(leaf))
            _collect(list(content.values()), found, seen, deep - 1)


def _content_of(value: Any) -> dict[Any, Any]:
    """The items of a container of a class of its own, the attributes of any other object."""
    if isinstance(value, _CLOSED):
        return {}
    items = (
        dict.items(value) if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    return {**dict(items), **in_slots(value), **getattr(value, "__dict__", {})}


def slots_of(kind: type) -> list[str]:
    """The names of a class's slots; one that is not written in Python has none that could be set."""
    written = [vars(one) for one in kind.__mro__ if "__slots__" in vars(one)]
    return [name for own in written for name, member in own.items() if isinstance(member, MemberDescriptorType)]


def in_slots(value: Any) -> dict[str, Any]:
    """What an object holds in the slots of its class, by name."""
    found = {}
    for name in slots_of(type(value)):
        with suppress(AttributeError):  # of one that is empty
            found[name] = object.__getattribute__(value, name)
    return found


def with_tensors(function: Callable[[Any], Any], value: Any) -> Any:
    """The same with other tensors: `tree_map`, into dataclasses and objects too, which are copied.

    >>> from types import SimpleNamespace
    >>> from torch import ones
    >>> with_tensors(lambda x: x + 1, SimpleNamespace(logits=ones(1)))
    namespace(logits=tensor([2.]))
    """
    return _mapped(function, value, _DEEP)


def _mapped(function: Callable[[Any], Any], value: Any, deep: int) -> Any:
    def of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) or not deep or not tensors_in(leaf):
            return function(leaf)
        made = copy.copy(leaf)
        for name, part in _content_of(leaf).items():
            other = _mapped(function, part, deep - 1)
            if other is part:
                continue
            if isinstance(leaf, dict) and name in leaf:
                dict.__setitem__(made, name, other)
            elif isinstance(leaf, list) and isinstance(name, int):
                list.__setitem__(made, name, other)
            else:
                object.__setattr__(made, name, other)
        return made

    return tree_map(of, value)
