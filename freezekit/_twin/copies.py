"""`copy.deepcopy` for models that are to be run: tensors are replaced, and what functions hold is copied too."""

from __future__ import annotations

import copy
import copyreg
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper, lru_cache, partial
from itertools import count
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ref

from torch import Generator, Tensor, nn
from torch._C import DisableTorchFunction
from torch.overrides import TorchFunctionMode

from freezekit._inputs import in_slots
from freezekit._twin.renaming import renamed
from freezekit._twin.surroundings import CONTAINERS, content_of, is_filled, modules_in, modules_within, names_in

# How `copy` is to copy what it refuses, or would put in a tensor, which may have no data here. Of a lock that is taken
# there is a copy that is not.
_REDUCED: dict[type, Callable[[Any], Any]] = {
    Generator: lambda generator: (generator.clone_state, ()),
    ModuleType: lambda module: module.__name__,  # its own copy, as a function is
    type(threading.Lock()): lambda lock: (threading.Lock, ()),
    type(threading.RLock()): lambda lock: (threading.RLock, ()),
    threading.local: lambda local: (threading.local, (), vars(local)),
}
_lock = threading.Lock()
_copying: list[Any] = []  # of all threads
_number = count()

# What is copied with a function that holds it. An object of any other class may hold half of the program.
_HOLDERS = (Tensor, nn.Module, *CONTAINERS, tuple, FunctionType, MethodType, partial)


class Copies(TorchFunctionMode):
    """Copies of modules, tensors and all that they reach: running them does not write to the originals.

    To `copy` a function is a constant, and so are a weak reference and a cache of `functools`. But a function that is a
    module's attribute, or a hook on it, often holds the module, or a list that it writes to.

    Args:
        stand_in: makes the copy of a tensor.
    """

    def __init__(self, stand_in: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._stand_in = stand_in
        self._given: dict[tuple[int, str], str] = {}
        self._names: dict[str, tuple[dict[str, Any], Any]] = {}
        self._methods: list[tuple[dict[str, Any], str, MethodType]] = []
        self._caches: dict[type, dict[str, Any]] = {}
        self._memo: dict[int, Any] = {}
        # `copy` keeps the originals alive in this list, since a memo knows them by their ids.
        self._originals: list[Any] = self._memo.setdefault(id(self._memo), [])

    @contextmanager
    def named(self) -> Iterator[None]:
        """Context manager: copied functions find copies by names of their own, beside the names of their Python module.

        So they share all other global names with functions that are not copied, whoever sets them. Copied objects have
        the methods that their class caches, with caches of the twin's: those of the class would keep the copies.
        """
        for name, (known, value) in self._names.items():
            known[name] = value
        for held, name, method in self._methods:
            held[name] = method
        try:
            yield
        finally:
            for held, name, _ in self._methods:
                held.pop(name, None)
            for _, _, method in self._methods:
                method.cache_clear()  # type: ignore[attr-defined]
            for name, (known, _) in self._names.items():
                known.pop(name, None)

    def __enter__(self) -> Copies:
        with _lock:
            copyreg.dispatch_table.update(_REDUCED)
            _copying.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with _lock:
            _copying.remove(self)
            for kind in () if _copying else _REDUCED:
                copyreg.dispatch_table.pop(kind, None)

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
        """Copies a module's tensors first: `copy.deepcopy` does not pass parameters to the mode as tensors."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._tensor(tensor)

    def of(self, value: Any) -> Any:
        """The copy of anything.

        Raises:
            TypeError: it has none.
            NotImplementedError: a tensor in it has no stand-in.
        """
        known = len(self._memo)
        try:
            return self._constant(value, copy.deepcopy(value, self._memo))
        except Exception as error:  # of any class that is reached
            for key in list(self._memo)[known:]:  # of copies that are not complete
                del self._memo[key]
            where = self._culprit(value)
            if isinstance(error, NotImplementedError):  # of a tensor that has no stand-in
                raise NotImplementedError(f"{error} ({where!r})" if where else str(error)) from error
            cure = f"hold {where!r} in an object whose __deepcopy__ returns the object itself; " if where else ""
            raise TypeError(f"{type(value).__name__} is run on a copy, and cannot be copied: {cure}{error}") from error

    def _culprit(self, value: Any) -> str:
        """Which attribute keeps a module from being copied; "" where that is not known."""
        modules = dict(value.named_modules()) if isinstance(value, nn.Module) else {}
        known = {**self._memo, **{id(module): module for module in modules.values()}}
        for name, module in modules.items():
            for attribute, held in vars(module).items():
                try:
                    copy.deepcopy(held, dict(known))
                except Exception:  # of any class, as above
                    return f"{name}.{attribute}" if name else attribute
        return ""

    def finish(self) -> None:
        """Replaces what `copy` passed through as a constant by copies, in all that was copied.

        What an object's own ``__deepcopy__`` created is left alone: no original has it.
        """
        for original in self._originals:  # which grows on the way
            if id(original) in self._memo:
                self._mend(original, self._memo[id(original)])
        del self._stand_in  # a method of what holds this: after `gc.freeze()` the two would never be collected

    def _complete(self, original: nn.Module, copied: nn.Module) -> None:
        """Adds attributes that a class leaves out of its ``__getstate__``; its forward may read them."""
        missing = vars(original).keys() - vars(copied).keys() - {"_compiled_call_impl"}
        slots = in_slots(original)  # which `nn.Module.__setstate__` ignores
        for name, value in {**{name: vars(original)[name] for name in missing}, **slots}.items():
            try:
                made = self.of(value)
            except TypeError:  # mostly what cannot be pickled
                continue
            if name in slots:
                object.__setattr__(copied, name, made)
            else:
                vars(copied)[name] = made

    def _mend(self, original: Any, copied: Any) -> None:
        if isinstance(original, nn.Module) and not hasattr(type(original), "__deepcopy__"):
            self._complete(original, copied)
        self._methods += self._cached_methods(original, copied)
        if type(copied) is partial:
            func, args = self._constant(original.func, copied.func), self._constant(original.args, copied.args)
            copied.__setstate__((func, args, copied.keywords, vars(copied)))  # type: ignore[attr-defined]
        for source, target in ((original, copied), (_attributes(original), _attributes(copied))):
            entries = _entries(target)
            for key, value in _entries(source).items():
                key = self._memo.get(id(key), key)
                if key in entries and (made := self._constant(value, entries[key])) is not entries[key]:
                    target[key] = made

    def _cached_methods(self, original: Any, copied: Any) -> Iterator[tuple[dict[str, Any], str, MethodType]]:
        """What an object's class caches by the object itself: where it is to be, by which name, and the method."""
        held, kind = _attributes(copied), type(copied)
        # One that equals its original may find there what the original's calls have made.
        if not isinstance(held, dict) or held is _attributes(original) or kind.__eq__ is not object.__eq__:
            return
        if kind not in self._caches:
            self._caches[kind] = _new_caches(kind)
        for name, cache in self._caches[kind].items():
            if name not in held:
                yield held, name, MethodType(cache, copied)

    def _constant(self, original: Any, copied: Any) -> Any:
        """The copy, with what `copy` passed through as a constant copied too: all of it, or parts."""
        kind = type(copied)
        if copied is original:
            if kind is FunctionType:
                return self._function(original)
            if kind is ref:
                return ref(self._memo[id(original())]) if id(original()) in self._memo else original
            if kind is _lru_cache_wrapper:
                wrapped = self.of(original.__wrapped__)
                same = wrapped == original.__wrapped__
                return original if same else lru_cache(**original.cache_parameters())(wrapped)
        if kind is MethodType and type(original) is kind:
            function = self._constant(original.__func__, copied.__func__)
            return copied if function is copied.__func__ else MethodType(function, copied.__self__)
        if issubclass(kind, tuple) and type(original) is kind:
            parts = list(map(self._constant, original, copied))
            if any(a is not b for a, b in zip(parts, copied)):
                return kind._make(parts) if hasattr(kind, "_make") else tuple(parts)
        return copied

    def _function(self, function: FunctionType) -> FunctionType:
        """A copy, if the function holds something or runs modules that it names."""
        if id(function) in self._memo:
            return self._memo[id(function)]
        code, known, cells = function.__code__, function.__globals__, function.__closure__ or ()
        named = {name: known[name] for name in names_in(code) if name in known}
        modules = {name: value for name, value in named.items() if modules_in(value) or modules_within(value)}
        defaults, by_name = function.__defaults__, function.__kwdefaults__
        held = (*(defaults or ()), *(by_name or {}).values())
        if not (cells or modules or any(isinstance(value, _HOLDERS) for value in held)):
            return function
        names = {name: self._name_for(known, name) for name in modules}
        made = FunctionType(renamed(code, names), known, function.__name__, None, tuple(CellType() for _ in cells))
        made.__dict__.update(vars(function))
        self._note(function, made)  # before what it holds, which may hold it
        for name, value in modules.items():
            self._names.setdefault(names[name], (known, self._held(value)))
        for source, target in zip(cells, made.__closure__ or ()):
            if is_filled(source):
                target.cell_contents = self._held(source.cell_contents)
        made.__defaults__ = defaults and tuple(map(self._held, defaults))
        made.__kwdefaults__ = by_name and {name: self._held(value) for name, value in by_name.items()}
        return made

    def _name_for(self, known: dict[str, Any], name: str) -> str:
        """By what global name copied functions know a copy; each twin has its own, since two may run at a time."""
        return self._given.setdefault((id(known), name), f"{name} (copy {next(_number)})")

    def _held(self, value: Any) -> Any:
        """What a function's copy is to hold in place of `value`: a copy, or `value` itself."""
        if isinstance(value, _HOLDERS):
            try:
                return self.of(value)
            except TypeError:  # a list with a lock in it, say
                pass
        elif modules := modules_in(value):
            if id(value) not in self._memo:
                made = self._note(value, copy.copy(value))
                vars(made).update({name: self.of(module) for name, module in modules.items()})
            return self._memo[id(value)]
        return value

    def _note(self, original: Any, made: Any) -> Any:
        self._memo[id(original)] = made
        self._originals.append(original)
        return made


def _new_caches(kind: type) -> dict[str, Any]:
    """Empty caches for the methods that a class caches by `functools.cache` or `lru_cache`, by name."""
    known = {name: value for one in reversed(kind.__mro__) for name, value in vars(one).items()}
    found = {name: value for name, value in known.items() if type(value) is _lru_cache_wrapper}
    return {name: lru_cache(**cache.cache_parameters())(cache.__wrapped__) for name, cache in found.items()}


def _attributes(value: Any) -> Any:
    return getattr(value, "__dict__", None)


def _entries(holder: Any) -> dict[Any, Any]:
    """What a list, a deque or a dictionary holds, by index or key; of anything else nothing."""
    return (
        dict(enumerate(holder))
        if isinstance(holder, list | deque)
        else dict(content_of(holder))
        if isinstance(holder, dict)
        else {}
    )
