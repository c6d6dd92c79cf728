"""A function's source as a tree, known to be what runs, and functions made from such trees.

The text is found by file and line, and the file may have been edited since it was imported. So it is compiled again,
and counts only if that gives the same bytecode as the one that runs.
"""

import ast
import linecache
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any

# A function that looks at its own variables would see those of a rewritten one.
_LOOK_AT_VARIABLES = frozenset({"locals", "vars", "eval", "exec", "dir", "globals"})
_FUTURE_FLAGS = 0x1FE0000  # bits of co_flags that `from __future__ import ...` sets
_Place = tuple[int, str]


class Unreadable(Exception):
    """A function that cannot be rewritten; the text says why."""


@dataclass(frozen=True)
class Source:
    """A function and the tree of its definition."""

    function: FunctionType
    tree: ast.FunctionDef


def read(function: Any) -> Source:
    """The source of a plain Python function.

    Raises:
        Unreadable: with the reason.
    """
    if type(function) is not FunctionType:
        raise Unreadable(f"its forward is a {type(function).__name__}, not a function")
    if hasattr(function, "__wrapped__"):
        raise Unreadable("its forward is wrapped by a decorator")
    tree = parsed(function)
    if reason := _why_not(tree):
        raise Unreadable(reason)
    return Source(function, tree)


def parsed(function: FunctionType) -> ast.FunctionDef:
    """The tree of a function's definition, whatever it does.

    Raises:
        Unreadable: with the reason.
    """
    code = function.__code__
    trees, codes = _file("".join(linecache.getlines(code.co_filename, function.__globals__)), code.co_filename)
    place = code.co_firstlineno, code.co_name
    if place not in trees or place not in codes:
        raise Unreadable("the source of its forward cannot be read")
    if not _same(codes[place], code):
        raise Unreadable("the source of its forward is not what runs")
    return trees[place]


@lru_cache(maxsize=64)
def _file(text: str, name: str) -> tuple[dict[_Place, ast.FunctionDef], dict[_Place, CodeType]]:
    """The definitions in a file and their code, by first line (a decorator's, where there is one) and name."""
    try:
        tree = ast.parse(text)
        stack = [compile(tree, name, "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        return {}, {}
    trees = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            trees[min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.name] = node
    codes = {}
    while stack:
        code = stack.pop()
        codes[code.co_firstlineno, code.co_name] = code
        stack += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return trees, codes


def define(source: Source, tree: ast.FunctionDef, values: Mapping[str, Any]) -> FunctionType:
    """A function that runs `tree` where `source.function` runs: with its globals, closure and defaults.

    Args:
        values: what the tree's new names stand for.
    """
    function = source.function
    code = _compile(tree, function, tuple(values))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: CellType(value) for name, value in values.items()}
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _compile(tree: ast.FunctionDef, function: FunctionType, more: tuple[str, ...]) -> CodeType:
    """The code of a definition alone, without its decorators, defaults and annotations, which were evaluated once."""
    code = function.__code__
    # Private names are spelled by the class around them; free variables come from a function around that.
    owner = function.__qualname__.split(".")[-2:-1]
    outer: Any = ast.parse("def _():\n class _:\n  def _(): pass").body[0]
    around = outer.body[0]
    inner = around.body[0]
    outer.args.args = [ast.arg(name) for name in (*code.co_freevars, *more)]
    around.name = owner[0] if owner and owner[0].isidentifier() else "_"
    if around.name not in (*code.co_freevars, *more):
        # What the definition calls by the class's name is a global: the class here must not stand in front of it.
        outer.body.insert(0, ast.Global([around.name]))
    own = tree.args
    inner.name, inner.body = tree.name, tree.body
    inner.args.posonlyargs, inner.args.args, inner.args.kwonlyargs = (
        [ast.arg(one.arg) for one in arguments] for arguments in (own.posonlyargs, own.args, own.kwonlyargs)
    )
    inner.args.kw_defaults = [None] * len(own.kwonlyargs)
    inner.args.vararg = own.vararg and ast.arg(own.vararg.arg)
    inner.args.kwarg = own.kwarg and ast.arg(own.kwarg.arg)
    for made in (outer, around, inner):
        ast.copy_location(made, tree)
    module = ast.fix_missing_locations(ast.Module(body=[outer], type_ignores=[]))
    flags = code.co_flags & _FUTURE_FLAGS
    whole = compile(module, code.co_filename, "exec", flags=flags, dont_inherit=True)
    return _inside(_inside(_inside(whole)))


def _inside(code: CodeType) -> CodeType:
    (found,) = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return found


def _same(a: CodeType, b: CodeType) -> bool:
    """Whether two pieces of code do the same; their place in the file does not matter."""
    names = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_exceptiontable")
    if any(getattr(a, name, None) != getattr(b, name, None) for name in names):
        return False
    if len(a.co_consts) != len(b.co_consts):
        return False
    return all(_same_constant(one, other) for one, other in zip(a.co_consts, b.co_consts, strict=True))


def _same_constant(a: Any, b: Any) -> bool:
    if isinstance(a, CodeType) and isinstance(b, CodeType):
        return _same(a, b)
    return type(a) is type(b) and (a == b if isinstance(a, frozenset) else repr(a) == repr(b))


def _why_not(tree: ast.FunctionDef) -> str:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Yield, ast.YieldFrom)):
            return "its forward is a generator"
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            return f"its forward declares {node.names[0]} {type(node).__name__.lower()}"
        if isinstance(node, ast.Name) and node.id in _LOOK_AT_VARIABLES:
            return f"its forward calls {node.id}()"
    return ""
