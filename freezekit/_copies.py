"""`copy.deepcopy` for what is to be run: tensors are made anew, and what functions hold is copied as well."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import _lru_cache_wrapper, lru_cache, partial
from types import CellType, FunctionType, MethodType
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.overrides import TorchFunctionMode

from freezekit._strangers import is_filled, modules_in

_CONTAINERS = (dict, list, set)
_MOST_ROUNDS = 100  # each follows what functions hold one step further
# What is copied with a function that holds it. An object of any other class may hold half of the program.
_HOLDERS = (Tensor, nn.Module, *_CONTAINERS, tuple, FunctionType, MethodType, partial)


class Copies(TorchFunctionMode):
    """Copies of modules, of tensors and of all that they reach: a run of them writes to nothing of the originals.

    To `copy` a function is a constant, and so are a weak reference and a cache of `functools`. But a function that is a
    module's attribute, or a hook on it, often holds the module, or a list that it writes to.

    Args:
        stand_in: makes the copy of a tensor.

    Attributes:
        shared: lists, dictionaries and sets that functions reach and that are not copied: those known by a global name,
            by which the forward may know them too, and those of objects of any class.
    """

    def __init__(self, stand_in: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._stand_in = stand_in
        self._memo: dict[int, Any] = {}
        self._functions: list[tuple[FunctionType, FunctionType]] = []
        self.shared: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self._tensor(args[0])
        if func is Tensor.clone:  # how a parameter is copied
            return self._stand_in(args[0])
        return func(*args, **(kwargs or {}))

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._memo:
            with DisableTorchFunction():
                self._memo[id(tensor)] = self._stand_in(tensor)
        return self._memo[id(tensor)]

    def add(self, module: nn.Module) -> None:
        """Registers what `copy.deepcopy` would not take for a tensor: parameters."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._tensor(tensor)

    def of(self, value: Any) -> Any:
        """The copy of anything.

        Raises:
            TypeError: it has none.
        """
        known, functions = len(self._memo), len(self._functions)
        try:
            return self._constant(copy.deepcopy(value, self._memo))
        except Exception as error:  # of any class that is reached
            for key in list(self._memo)[known:]:  # of copies that are not complete
                del self._memo[key]
            del self._functions[functions:]
            raise TypeError(f"{type(value).__name__} is run on a copy, and cannot be copied: {error}") from error

    def finish(self) -> None:
        """Puts copies where `copy` took something for a constant, in all that was copied.

        Raises:
            TypeError: there is no end to it: an object's ``__deepcopy__`` makes new ones each time.
        """
        mended, filled = {id(self._memo)}, 0  # under its own id a memo keeps originals alive
        for _ in range(_MOST_ROUNDS):
            new = [key for key in self._memo if key not in mended]
            if not new and filled == len(self._functions):
                return
            for copied in [self._memo[key] for key in new]:
                self._mend(copied)
                self._memo[id(copied)] = copied  # what holds a copy, as its methods do, is to keep it
            mended.update(new, (id(self._memo[key]) for key in new))
            todo, filled = self._functions[filled:], len(self._functions)
            for function, made in todo:
                self._fill(function, made)
        raise TypeError("model is run on a copy, and copying it makes new objects for ever")

    def _mend(self, copied: Any) -> None:
        if type(copied) is partial:
            held = self._constant(copied.func), self._constant(copied.args), copied.keywords, vars(copied)
            copied.__setstate__(held)  # type: ignore[attr-defined]
        for holder in (copied, getattr(copied, "__dict__", None)):
            if isinstance(holder, dict | list):
                for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
                    if (made := self._constant(value)) is not value:
                        holder[key] = made

    def _constant(self, value: Any) -> Any:
        """The copy of what is a constant to `copy`, also within a tuple; anything else as it is."""
        kind = type(value)
        if kind is FunctionType:
            return self._function(value)
        if kind is MethodType:
            function = self._constant(value.__func__)
            return value if function is value.__func__ else MethodType(function, value.__self__)
        if kind is ref:
            return ref(self._memo[id(value())]) if id(value()) in self._memo else value
        if kind is _lru_cache_wrapper:
            wrapped = self.of(value.__wrapped__)
            return value if wrapped == value.__wrapped__ else lru_cache(**value.cache_parameters())(wrapped)
        if issubclass(kind, tuple):
            parts = [self._constant(part) for part in value]
            if any(a is not b for a, b in zip(parts, value)):
                return kind._make(parts) if hasattr(kind, "_make") else tuple(parts)
        return value

    def _function(self, function: FunctionType) -> FunctionType:
        """A copy, to be filled, if the function holds something or runs modules by names of its own."""
        if id(function) in self._memo:
            return self._memo[id(function)]
        code, known = function.__code__, function.__globals__
        modules = {name: known[name] for name in code.co_names if modules_in(known.get(name))}
        self.shared += [known[name] for name in code.co_names if isinstance(known.get(name), _CONTAINERS)]
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if not (function.__closure__ or modules or any(isinstance(value, _HOLDERS) for value in defaults)):
            return function
        if modules:
            known = {**known, **{name: self._held(held) for name, held in modules.items()}}
        made = FunctionType(code, known, function.__name__, None, tuple(CellType() for _ in code.co_freevars))
        made.__dict__.update(vars(function))
        self._memo[id(function)] = self._memo[id(made)] = made
        self._functions.append((function, made))
        return made

    def _fill(self, function: FunctionType, made: FunctionType) -> None:
        for source, target in zip(function.__closure__ or (), made.__closure__ or ()):
            if is_filled(source):
                target.cell_contents = self._held(source.cell_contents)
        made.__defaults__ = function.__defaults__ and tuple(map(self._held, function.__defaults__))
        made.__kwdefaults__ = function.__kwdefaults__ and {k: self._held(v) for k, v in function.__kwdefaults__.items()}

    def _held(self, value: Any) -> Any:
        """What a function's copy holds. What is not copied is to be put back, since it may hold what a run makes."""
        if isinstance(value, _HOLDERS):
            try:
                return self.of(value)
            except TypeError:  # a list with a lock in it, say
                pass
        elif modules := modules_in(value):
            if id(value) not in self._memo:
                made = self._memo[id(value)] = copy.copy(value)
                vars(made).update({name: self.of(module) for name, module in modules.items()})
            return self._memo[id(value)]
        if isinstance(value, _CONTAINERS):
            self.shared.append(value)
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, _HOLDERS):
            self.shared += [vars(value), *(held for held in vars(value).values() if isinstance(held, _CONTAINERS))]
        return value
