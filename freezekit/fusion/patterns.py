"""What a forward's expressions stand for: its children, what can be told of its tests, and the layers of a block."""

import ast
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from freezekit.fusion.layers import ACTIVATIONS, CONVS, function_kind
from freezekit.fusion.norms import is_norm
from freezekit.fusion.sequences import is_plain_sequence, members

_PLAIN = (bool, int, float, str, tuple, type(None))
_SOMETHING = object()  # what is only known not to be None
_MISSING = object()
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


class Unknown(Exception):
    """An expression whose value is not known before the call."""


@dataclass(frozen=True)
class LayerCall:
    """A call of one value that means something to a block.

    Attributes:
        kind: "conv", "norm", "activation", "identity", "sequence"; "module" for any other child.
        argument: the value.
        callee: what is called; None for a method of the value.
        path: of the child; the kind of an activation that is a function or a method.
        module: the child; None for functions.
    """

    kind: str
    argument: ast.expr
    callee: ast.expr | None
    path: str
    module: nn.Module | None = None


class Lookup:
    """Expressions of one function, as they are now for one module.

    Attributes:
        held: by the names of variables that hold a module's children, that module and its path.
    """

    def __init__(self, module: nn.Module, function: FunctionType, local: frozenset[str], self_name: str) -> None:
        self.module, self.function, self.local, self.self_name = module, function, local, self_name
        self.held: dict[str, tuple[str, nn.Module]] = {}

    def child(self, node: ast.expr) -> tuple[str, nn.Module] | None:
        """The child module that an expression is, and its path from the module."""
        if isinstance(node, ast.Name):
            return ("", self.module) if node.id == self.self_name else None
        if isinstance(node, ast.Attribute):
            found = self.child(node.value)
            return found and _child(*found, node.attr)
        if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Constant):
            return None
        index, value = node.slice.value, node.value
        if isinstance(value, ast.Name) and value.id in self.held and isinstance(index, str):
            return _child(*self.held[value.id], index, direct=True)
        if isinstance(value, ast.Attribute) and value.attr == "_modules" and isinstance(index, str):
            found = self.child(value.value)
            return found and _child(*found, index, direct=True)
        found = self.child(value)
        if found is None or type(index) is not int or type(found[1]) not in (nn.ModuleList, nn.Sequential):
            return None
        names = list(found[1]._modules)
        return _child(*found, names[index], direct=True) if -len(names) <= index < len(names) else None

    def call(self, node: ast.expr) -> LayerCall | None:
        """What a call of a child, of an activation function or of an activation method does."""
        if not isinstance(node, ast.Call) or any(isinstance(a, ast.Starred) for a in node.args):
            return None
        if isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
            kind = function_kind(node.func.attr)
            if kind is not None and self.child(node.func.value) is None:
                return LayerCall("activation", node.func.value, None, kind)
        if not node.args:
            return None
        argument, found = node.args[0], self.child(node.func)
        if found is not None:
            path, module = found
            return (
                LayerCall(kind_of(module), argument, node.func, path, module)
                if len(node.args + node.keywords) == 1
                else None
            )
        function = self.value_of(node.func)
        kind = None if isinstance(function, str) else function_kind(function)
        return LayerCall("activation", argument, node.func, kind) if kind and _only_in_place(node) else None

    def value_of(self, node: ast.expr) -> Any:
        """What a global name, or an attribute of a Python module, is now; None for anything else."""
        if isinstance(node, ast.Name) and node.id not in self.local:
            return self.function.__globals__.get(node.id)
        if isinstance(node, ast.Attribute):
            value = self.value_of(node.value)
            return getattr(value, node.attr, None) if isinstance(value, ModuleType) else None
        return None

    def test(self, node: ast.expr) -> Any:
        """The value of an expression of constants and plain attributes, which evaluating does not change.

        Raises:
            Unknown: for any other expression.
        """
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not _truth(self.test(node.operand))
        if isinstance(node, ast.BoolOp):
            value = None
            for part in node.values:
                value = self.test(part)
                if _truth(value) is isinstance(node.op, ast.Or):
                    break
            return value
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self.test(node.left), self.test(node.comparators[0])
            by_identity = isinstance(node.ops[0], (ast.Is, ast.IsNot))
            if not by_identity and _SOMETHING in (left, right):
                raise Unknown
            if by_identity and left is _SOMETHING and right is _SOMETHING:
                raise Unknown
            try:
                return _COMPARE[type(node.ops[0])](left, right)
            except TypeError:
                raise Unknown from None
        if isinstance(node, ast.Attribute):
            found = self.child(node.value)
            if found is not None:
                return _attribute(found[1], node.attr)
        raise Unknown

    def truth(self, node: ast.expr) -> bool:
        return _truth(self.test(node))


def _truth(value: Any) -> bool:
    if value is _SOMETHING:
        raise Unknown
    return bool(value)


def _attribute(module: nn.Module, name: str) -> Any:
    if type(module).__getattribute__ is not object.__getattribute__:
        raise Unknown
    value = inspect.getattr_static(module, name, _MISSING)
    if value is _MISSING:
        for place in (module._parameters, module._buffers, module._modules):
            if name in place:
                return None if place[name] is None else _SOMETHING
    if value is _MISSING or not isinstance(value, _PLAIN):
        raise Unknown
    return value


def _child(path: str, module: nn.Module, name: str, direct: bool = False) -> tuple[str, nn.Module] | None:
    if not direct and (
        inspect.getattr_static(module, name, _MISSING) is not _MISSING
        or type(module).__getattr__ is not nn.Module.__getattr__
        or type(module).__getattribute__ is not object.__getattribute__
    ):
        return None
    found = module._modules.get(name)
    return None if found is None else (f"{path}.{name}" if path else name, found)


def kind_of(module: nn.Module) -> str:
    """What a child is to a block, see `LayerCall`."""
    kind = type(module)
    if kind in CONVS:
        return "conv"
    if is_norm(module):
        return "norm"
    if kind in ACTIVATIONS:
        return "activation"
    if kind is nn.Identity:
        return "identity"
    if is_plain_sequence(module) and _ends_open([child for _, child in members(module)]):
        return "sequence"
    return "module"


def _ends_open(children: list[nn.Module]) -> bool:
    """Whether what follows a sequence can belong to a block with the convolution at its end."""
    while children and type(children[-1]) is nn.Identity:
        children.pop()
    if children and is_norm(children[-1]):
        children.pop()
    return bool(children) and type(children[-1]) in CONVS


def _only_in_place(node: ast.Call) -> bool:
    """Whether a function is called with a value and no more than ``inplace``."""
    more = [*node.args[1:], *(k.value for k in node.keywords if k.arg == "inplace")]
    return len(more) == len(node.args) + len(node.keywords) - 1 <= 1 and all(
        isinstance(value, ast.Constant) and isinstance(value.value, bool) for value in more
    )


@dataclass(frozen=True)
class Sum:
    """left + right, written into the left one or not; `function` must still be ``torch.add`` where it is given."""

    left: ast.expr
    right: ast.expr
    in_place: bool = False
    function: ast.expr | None = None


def as_sum(lookup: Lookup, node: ast.expr) -> Sum | None:
    """What an expression adds: ``a + b``, ``torch.add(a, b)``, ``a.add_(b)``."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return Sum(node.left, node.right)
    if not isinstance(node, ast.Call) or node.keywords or any(isinstance(a, ast.Starred) for a in node.args):
        return None
    if len(node.args) == 2 and lookup.value_of(node.func) is torch.add:
        return Sum(node.args[0], node.args[1], function=node.func)
    if len(node.args) == 1 and isinstance(node.func, ast.Attribute) and node.func.attr == "add_":
        return Sum(node.func.value, node.args[0], in_place=True)
    return None
