"""Methods that ask for the exact class of a module: of their own, or of one that it contains.

Where a module's class is another one than its author wrote, `type(layer) is nn.ReLU` and `type(self).calls += 1` have
another outcome. What torch calls of a module (forward, train, ...), and what that calls, is read for such expressions;
where there is one, the class stays.
"""

import ast
import builtins
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from freezekit.fusion.source import Unreadable, parsed

OWN = "a method of its class asks for the exact class of its module"
INSIDE = "a method of a module around it asks for the exact class of its modules"

# What is the same for a class and its subclass; other attributes are inherited.
_DIFFER = frozenset({"__base__", "__bases__", "__dict__", "__mro__", "__subclasses__", "mro"})
# They run before a class can have changed, or are told of the class as it was written.
_TOLD = frozenset(
    {
        "__class_getitem__",
        "__init__",
        "__new__",
        "__init_subclass__",
        "__reduce__",
        "__reduce_ex__",
        "__copy__",
        "__deepcopy__",
    }
)


@dataclass
class _Asked:
    """Whose exact class is asked for: the module's own, any that it contains, those of some classes."""

    own: bool = False
    any: bool = False
    kinds: set[type] = field(default_factory=set)


def classes_read(model: nn.Module) -> dict[int, str]:
    """The modules of `model` whose class somebody inside it looks at, by id, and who does."""
    found: dict[int, str] = {}
    read: dict[type[nn.Module], _Asked] = {}
    for module in model.modules():
        kind = _written(type(module))
        asked = read[kind] = read.get(kind) or _read(kind)
        if asked.any or asked.kinds:
            inner = [m for m in module.modules() if asked.any or _written(type(m)) in asked.kinds]
            found |= {id(m): INSIDE for m in inner if id(m) not in found}
        if asked.own:
            found[id(module)] = OWN
    return found


def _written(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a user wrote, beneath those that freezekit makes."""
    return next(
        k for k in kind.__mro__ if not k.__module__.startswith("freezekit.") and "_freezekit_plan" not in vars(k)
    )


def _read(kind: type[nn.Module]) -> _Asked:
    """What is asked by the methods of a class that torch calls."""
    methods: dict[str, list[tuple[FunctionType, type]]] = {}
    for base in kind.__mro__:
        if not base.__module__.startswith(("torch.", "typing", "freezekit.")):
            for name, value in vars(base).items():
                methods.setdefault(name, []).extend((f, type(value)) for f in _functions(value))
    asked = _Asked()
    for name in _reached(methods):
        for function, wrapper in methods[name]:
            if wrapper is classmethod or not {"type", "__class__"}.isdisjoint(_names(function.__code__)):
                _read_function(function, wrapper, asked)
    return asked


def _reached(methods: Mapping[str, list[tuple[FunctionType, type]]]) -> set[str]:
    """What nn.Module has too (forward, train, ...), and all whose names occur in one of these."""
    reached: set[str] = set()
    waiting = [name for name in methods if hasattr(nn.Module, name) and name not in _TOLD]
    while waiting:
        name = waiting.pop()
        if name in methods and name not in reached:
            reached.add(name)
            waiting += [called for function, _ in methods[name] for called in _names(function.__code__)]
    return reached


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _functions(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, property):
        candidates = [value.fget, value.fset, value.fdel]
    elif isinstance(value, (staticmethod, classmethod)):
        candidates = [value.__func__]
    elif isinstance(value, cached_property):
        candidates = [value.func]
    else:
        candidates = [value]
    for one in candidates:
        while isinstance(one, FunctionType):
            yield one
            one = getattr(one, "__wrapped__", None)


def _read_function(function: FunctionType, wrapper: type, asked: _Asked) -> None:
    try:
        tree = parsed(function)
    except Unreadable:
        asked.own = asked.any = True
        return
    arguments = [*tree.args.posonlyargs, *tree.args.args]
    mine = arguments[0].arg if arguments and wrapper is not staticmethod else ""
    harmless: set[ast.AST] = set()
    for node in ast.walk(tree):  # parents come before their children
        inherited = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr not in _DIFFER
        if inherited or isinstance(node, ast.FormattedValue):
            harmless.add(node.value)  # type: ignore[attr-defined]
        elif isinstance(node, ast.Compare) and len(node.comparators) == 1:
            side, other = node.left, node.comparators[0]
            if _class_of(side) is None:
                side, other = other, side
            kinds = _classes(other, function)
            if kinds is not None and not _is_of(side, mine):
                asked.kinds |= kinds
                harmless.add(side)
        if node in harmless:
            continue
        if _is_of(node, mine) or (wrapper is classmethod and isinstance(node, ast.Name) and node.id == mine):
            asked.own = True
        elif _class_of(node) is not None:
            asked.any = True


def _is_of(node: ast.AST, mine: str) -> bool:
    """Whether an expression gives the class of the method's own module."""
    of = _class_of(node)
    return isinstance(of, ast.Name) and of.id == mine


def _classes(node: ast.expr, function: FunctionType) -> set[type] | None:
    """The classes that an expression names, one or several; None if it does not name classes alone."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        several = [_classes(part, function) for part in node.elts]
        return None if None in several else set().union(*filter(None, several))
    value = _named(node, function)
    return {value} if isinstance(value, type) else None


def _named(node: ast.expr, function: FunctionType) -> Any:
    if isinstance(node, ast.Attribute):
        owner = _named(node.value, function)
        return getattr(owner, node.attr, None) if isinstance(owner, (type, ModuleType)) else None
    if not isinstance(node, ast.Name):
        return None
    code = function.__code__
    if node.id in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
        return None
    return function.__globals__.get(node.id, getattr(builtins, node.id, None))


def _class_of(node: ast.AST) -> ast.expr | None:
    """What an expression gives the class of; None if it gives no class."""
    if isinstance(node, ast.Attribute) and node.attr == "__class__":
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type":
        return node.args[0] if len(node.args) == 1 and not node.keywords else None
    return None
