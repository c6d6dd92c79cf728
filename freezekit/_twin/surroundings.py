"""Restores what a forward changes outside of its model: objects that it reaches by name, which no copy holds."""

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import _lru_cache_wrapper, partial
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules import module as hooks
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from freezekit._inputs import in_slots, slots_of
from freezekit._twin.untouched import form_of

CONTAINERS = (dict, list, set, deque)  # which a run may write to
_VALUES = (type(None), bool, int, float, complex, str, bytes, ModuleType)
_FOLLOWED = (nn.Module, Optimizer, LRScheduler, GradScaler)  # from any object, since they hold the state of a training
_WEAK = ("weakref", "_weakrefset")  # whose containers lose entries by themselves
# Their attributes are Python's or torch's own, and not followed.
_PLAIN = (*CONTAINERS, tuple, FunctionType, type, MethodType, staticmethod, classmethod, property, partial, Tensor)
_SMALL = 64 << 20  # bytes
_LIBRARIES = sys.stdlib_module_names | {"torch", "freezekit"}  # whose functions hold no tensors of a user


def names_of(function: FunctionType) -> dict[str, Any]:
    """The globals, closure variables and defaults that a function uses, by name."""
    code, known = function.__code__, function.__globals__
    found = {name: known[name] for name in names_in(code) if name in known}
    cells = zip(code.co_freevars, function.__closure__ or ())
    found.update((name, cell.cell_contents) for name, cell in cells if is_filled(cell))
    last_first = zip(code.co_varnames[: code.co_argcount][::-1], (function.__defaults__ or ())[::-1])
    return {**found, **dict(last_first), **(function.__kwdefaults__ or {})}


def modules_in(value: object) -> dict[str, nn.Module]:
    """A module, named "", or the modules in a list, a dictionary or an object of any class, by their names there.

    >>> list(modules_in({"vae": nn.Linear(2, 2), "size": 8})), list(modules_in(nn.ReLU()))
    (['vae'], [''])
    """
    if isinstance(value, nn.Module):
        return {"": value}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, type | FunctionType | ModuleType):
        return {}
    held = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    pairs = content_of(held) if isinstance(held, dict) else []
    return {str(name): part for name, part in pairs if isinstance(part, nn.Module)}


def modules_within(*functions: Any) -> dict[str, nn.Module]:
    """The modules of functions, by the names that these have for them; and of those that they hold or name.

    A decorator's wrapper holds one in its closure, and what a program calls often is what runs its model.
    """
    found: dict[str, nn.Module] = {}
    left, seen = list(functions), set()
    while left:
        function = left.pop(0)
        while isinstance(function, partial | MethodType):
            function = function.func if isinstance(function, partial) else function.__func__
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        known = names_of(function)
        owners = {name: value.__self__ for name, value in known.items() if isinstance(value, MethodType)}
        for name, value in {**known, **owners}.items():
            for inner, module in modules_in(value).items():
                path = ".".join(filter(None, (name, inner)))
                if found.setdefault(path, module) is not module:  # another function's, by the same name
                    found[f"{function.__qualname__}.{path}"] = module
        cells = [cell.cell_contents for cell in function.__closure__ or () if is_filled(cell)]
        left += cells if _is_a_librarys(function) else known.values()
    return found


def _is_a_librarys(value: Any) -> bool:
    return (value.__module__ or "").partition(".")[0] in _LIBRARIES


def is_filled(cell: CellType) -> bool:
    """Whether a variable of a closure has a value."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


class Surroundings:
    """The present state of all that some values reach: lists, dictionaries, sets, deques, attributes, generators.
    Of tensors it is ``.grad``, ``.data`` and ``.requires_grad``, too.

    The search goes from functions to what they name, into modules, optimizers, their schedulers, classes and nested
    containers, and into one object of any other class. It does not go on from one such object to the next: that might
    be half of the program, and another thread's.

    Args:
        values: where to start; the hooks of all modules are added.
        data: whether the run may write to tensors: then a copy of each, parameters aside, is kept.

    Attributes:
        modules: the modules found.
    """

    def __init__(self, values: Iterable[Any], *, data: bool) -> None:
        self.modules: list[nn.Module] = []
        self._data = data
        self._undo: list[Callable[[], object]] = []
        self._seen: dict[int, tuple[Any, int]] = {}
        everywhere = (hooks._global_forward_pre_hooks, hooks._global_forward_hooks)
        left = [(value, 1) for value in (*values, *everywhere)]
        while left:
            value, objects = left.pop()  # how many objects may still be followed
            if type(value).__module__ in _WEAK or isinstance(value, _VALUES):
                continue
            if self._seen.get(id(value), (None, -1))[1] >= objects:
                continue
            self._seen[id(value)] = (value, objects)
            left += [(part, objects) for part in self._parts(value)]
            if objects or isinstance(value, _FOLLOWED):
                left += [(part, objects - (not isinstance(value, _FOLLOWED))) for part in self._attributes(value)]

    def put_back(self) -> None:
        """Restores that state."""
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def _parts(self, value: Any) -> Iterable[Any]:
        """What a container holds or a function names. Notes how to restore `value`."""
        if isinstance(value, CONTAINERS):
            content = content_of(value)
            self._undo.append(partial(_fill, value, content))
            return [part for _, part in content] if isinstance(value, dict) else content
        if isinstance(value, tuple):
            return value
        if isinstance(value, FunctionType | type):
            if _is_a_librarys(value):  # which may hold a function of a user
                cells = value.__closure__ or () if isinstance(value, FunctionType) else ()
                return [cell.cell_contents for cell in cells if is_filled(cell)]
            if isinstance(value, type):
                self._undo.append(partial(_name, value, _own(value)))
                return (*value.__bases__, *vars(value).values())
            names = names_in(value.__code__)
            known = {name: value.__globals__[name] for name in names if name in value.__globals__}
            self._undo.append(partial(_bind, value.__globals__, names, known))
            named = [*known.values(), *names_of(value).values()]
            return [*named, *self._of_python(named, names)]
        if isinstance(value, MethodType | staticmethod | classmethod):
            return (value.__func__, getattr(value, "__self__", None))
        if isinstance(value, BuiltinMethodType):  # as ``seen.append``
            return (value.__self__,)
        if isinstance(value, property | partial | _lru_cache_wrapper):
            held = ("fget", "func", "args", "keywords", "__wrapped__")
            return [getattr(value, name, None) for name in held]
        if isinstance(value, Tensor):
            readable = value.layout is torch.strided and not (value.is_meta or value.is_nested)
            before = None
            if self._data and readable and not isinstance(value, nn.Parameter):
                before = value.detach().clone()
            self._undo.append(_Tensor(value, before).put_back)
        elif isinstance(value, torch.Generator):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif type(value) is random.Random:
            self._undo.append(partial(value.setstate, value.getstate()))
        elif type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
            self._undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif type(value).__module__.startswith("numpy.random") and hasattr(value, "set_state"):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, nn.Module):
            self.modules.append(value)
        elif _is_small_array(value):
            self._undo.append(partial(_write, value, value.copy()))
        return ()

    def _of_python(self, values: Iterable[Any], names: list[str]) -> Iterable[Any]:
        """What Python's modules among ``values`` have by these names, as in ``settings.last``, and theirs."""
        found: list[Any] = []
        left = [value for value in values if isinstance(value, ModuleType)]
        seen: set[int] = set()
        while left:
            module = left.pop()
            if id(module) in seen or module.__name__.partition(".")[0] in _LIBRARIES:
                continue
            seen.add(id(module))
            known = {name: vars(module)[name] for name in names if name in vars(module)}
            self._undo.append(partial(_bind, vars(module), names, known))
            found += known.values()
            left += [value for value in known.values() if isinstance(value, ModuleType)]
        return found

    def _attributes(self, value: Any) -> Iterable[Any]:
        """The attributes and the class of an object of any other class."""
        held, names = getattr(value, "__dict__", None), slots_of(type(value))
        if isinstance(value, _PLAIN) or not (isinstance(held, dict) or names):
            return ()
        slots = in_slots(value)
        self._undo.append(partial(_set, value, names, slots))
        return (held, *slots.values(), type(value))


def names_in(code: CodeType) -> list[str]:
    """The names that code and the functions within it use, attributes included."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return [*code.co_names, *(name for names in inner for name in names)]


def _built_in(container: Any) -> Any:
    """The built-in class of a container. Its methods are used, since an override may do anything: transformers has
    dictionaries that import a module for each of their items."""
    return next(kind for kind in (OrderedDict, *CONTAINERS) if isinstance(container, kind))


def content_of(container: Any) -> list[Any]:
    """The elements of a list, set or deque; of a dictionary pairs of keys and values."""
    kind = _built_in(container)
    return list(kind.items(container) if issubclass(kind, dict) else kind.__iter__(container))


def _fill(container: Any, content: list[Any]) -> None:
    if _identities(content_of(container)) == _identities(content):
        return
    kind = _built_in(container)
    kind.clear(container)
    if issubclass(kind, dict):
        for key, value in content:
            kind.__setitem__(container, key, value)
    else:
        add = kind.update if kind is set else kind.extend
        add(container, content)


def _identities(content: list[Any]) -> list[Any]:
    return [(id(part[0]), id(part[1])) if type(part) is tuple and len(part) == 2 else id(part) for part in content]


def _own(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("__")}


def _name(kind: type, attributes: dict[str, Any]) -> None:
    now = _own(kind)
    for name in now.keys() - attributes.keys():
        delattr(kind, name)
    for name, value in attributes.items():
        if name not in now or now[name] is not value:
            setattr(kind, name, value)


def _bind(known: dict[str, Any], names: Iterable[str], values: dict[str, Any]) -> None:
    for name in names:
        if name in values:
            known[name] = values[name]
        elif name in known and not _is_part(known[name], known.get("__name__"), name):
            del known[name]


def _is_part(value: Any, package: Any, name: str) -> bool:
    """Whether a package has this by an import of one of its modules, which Python does only once."""
    return isinstance(value, ModuleType) and value.__name__ == f"{package}.{name}"


def _set(value: Any, names: Iterable[str], slots: dict[str, Any]) -> None:
    now = in_slots(value)
    for name in names:
        if name not in slots and name in now:
            object.__delattr__(value, name)
        elif name in slots and now.get(name) is not slots[name]:
            object.__setattr__(value, name, slots[name])


def _is_small_array(value: Any) -> bool:
    """Whether this is an array of numpy's that may be written to, of a size to copy in passing."""
    numpy = sys.modules.get("numpy")
    return (
        numpy is not None
        and isinstance(value, numpy.ndarray)
        and not isinstance(value, numpy.memmap)
        and value.flags.writeable
        and value.nbytes <= _SMALL
    )


def _write(array: Any, before: Any) -> None:
    if array.shape == before.shape and array.tobytes() != before.tobytes():
        array[...] = before


class _Tensor:
    """What is set on a tensor and, where they are given, its values."""

    def __init__(self, tensor: Tensor, value: Tensor | None) -> None:
        self._tensor, self._value = tensor, value
        self._learns = tensor.requires_grad
        self._grad = tensor.grad if tensor.is_leaf else None
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        plain = plain and tensor.is_leaf and not (tensor.is_nested or tensor.is_quantized)
        plain = plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        with torch.inference_mode(False):
            self._alias = tensor.detach() if plain else None

    def put_back(self) -> None:
        tensor, alias = self._tensor, self._alias
        if alias is not None:
            if not (tensor.is_leaf or tensor._is_view()):  # an operator in place took it into its graph
                tensor.detach_()
            if (tensor.dtype, form_of(tensor)) != (alias.dtype, form_of(alias)):
                tensor.data = alias
        if tensor.is_leaf and tensor.requires_grad != self._learns:
            tensor.requires_grad_(self._learns)
        if tensor.is_leaf and tensor.grad is not self._grad:
            tensor.grad = self._grad
        if self._value is not None and not torch.equal(tensor, self._value):
            tensor.copy_(self._value)
