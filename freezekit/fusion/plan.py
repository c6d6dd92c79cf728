"""A module's forward, written again with blocks in place of the layers that they are made of.

All else of the forward stays as it is written, and runs where it ran: in the order, in the contexts, with the globals
and the closure of its own. A block is tried where its first layer stood; where it cannot run at that moment, the layers
run as the forward has them:

    _fk0 = fused(x, self.conv1, self.bn1, self.relu)
    if _fk0 is None:
        out = self.relu(self.bn1(self.conv1(x)))
    else:
        out = _fk0
"""

import ast
import inspect
from abc import ABCMeta
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from torch import nn

from freezekit.fusion.block import NAMES
from freezekit.fusion.blocks import Block, names_read
from freezekit.fusion.emission import Emitter
from freezekit.fusion.patterns import Lookup
from freezekit.fusion.sequences import members, nested, shape
from freezekit.fusion.source import Source, Unreadable, define, read
from freezekit.fusion.steps import Steps


@dataclass(frozen=True)
class BlockNames:
    """One block's layers, as paths from the module; an activation is a path or the kind of a function.

    `outside` is the path of a norm that reads the convolution's result and runs on its own.
    """

    conv: str
    norm: str | None
    activation: str | None
    calls_function: bool
    adds: bool
    outside: str = ""


@dataclass(frozen=True)
class FusionPlan:
    """What a module runs in place of methods of its own.

    Attributes:
        methods: by name, the method that was read and the one that stands for it.
        blocks: what they fuse.
        sequences: paths of the sequences that they run the layers of, instead of calling them.
        reason: why nothing is rewritten, or not all of it; "" otherwise.
        key: equal for plans that are the same.
    """

    methods: Mapping[str, tuple[FunctionType, FunctionType]]
    blocks: tuple[BlockNames, ...]
    sequences: tuple[str, ...] = ()
    reason: str = ""
    key: tuple[object, ...] = ()


def make_plan(module: nn.Module, kind: type[nn.Module]) -> FusionPlan:
    """What `fuse` makes of `module`, whose own class is `kind`; never fails, a plan may be to rewrite nothing."""
    if reason := _why_no_subclass(kind):
        return FusionPlan({}, (), (), reason)
    if (
        issubclass(kind, nn.Sequential)
        and kind.forward is nn.Sequential.forward
        and kind.__iter__ is nn.Sequential.__iter__
    ):
        return _plan_of({"forward": _of_sequence(module)})
    written: dict[str, _Written] = {}
    waiting, reasons = ["forward"], []
    while waiting:
        name = waiting.pop()
        if name in written:
            continue
        try:
            source = read(inspect.getattr_static(kind, name))
            written[name] = _rewrite(module, source)
        except Unreadable as error:
            reasons.append(str(error))
            continue
        waiting += _methods_called(source, kind)
    return _plan_of(written, "; ".join(dict.fromkeys(reasons)))


def _why_no_subclass(kind: type[nn.Module]) -> str:
    """Why no subclass is made of a class: `__init_subclass__` or a metaclass would run, and may register it."""
    if type(kind) not in (type, ABCMeta) and type(kind).__module__ != "typing":
        return f"its class has a metaclass of its own, {type(kind).__name__}"
    for base in kind.__mro__[:-1]:
        if "__init_subclass__" in vars(base) and base.__module__ != "typing":
            return f"{base.__name__} has an __init_subclass__, which is told of each class that is made"
    return ""


@dataclass(frozen=True)
class _Written:
    source: Source
    tree: ast.FunctionDef
    blocks: tuple[BlockNames, ...]
    sequences: tuple[str, ...]
    values: Mapping[str, Any]


def _plan_of(written: Mapping[str, _Written], reason: str = "") -> FusionPlan:
    good = {name: one for name, one in written.items() if one.blocks}
    methods = {name: (one.source.function, define(one.source, one.tree, one.values)) for name, one in good.items()}
    blocks = tuple(block for one in good.values() for block in one.blocks)
    sequences = tuple(path for one in good.values() for path in one.sequences)
    key = tuple(
        (name, one.source.function, ast.unparse(one.tree), one.blocks, *one.values.items())
        for name, one in good.items()
    )
    return FusionPlan(methods, blocks, sequences, reason, key)


def _rewrite(module: nn.Module, source: Source) -> _Written:
    tree, function = source.tree, source.function
    arguments = [*tree.args.posonlyargs, *tree.args.args]
    if not arguments:
        raise Unreadable("its forward takes no self")
    self_name = arguments[0].arg
    if any(isinstance(n, ast.Name) and n.id == self_name and not isinstance(n.ctx, ast.Load) for n in ast.walk(tree)):
        raise Unreadable(f"its forward gives {self_name} another value")
    taken = {*function.__code__.co_varnames, *function.__code__.co_cellvars, *function.__code__.co_freevars}
    prefix = "_fk"
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    while any(name.startswith(prefix) for name in (*taken, *named)):
        prefix += "_"
    fresh = (f"{prefix}{i}" for i in range(10**9))
    uses = Counter(names_read(tree))
    captured = frozenset(function.__code__.co_cellvars)
    steps = Steps(Lookup(module, function, frozenset(taken), self_name), uses, captured, fresh)
    emitter = Emitter(steps, uses, captured, prefix)
    body = emitter.body(tree.body)
    new = ast.FunctionDef(**{**dict(ast.iter_fields(tree)), "body": body, "decorator_list": []})
    ast.copy_location(new, tree)
    values = {prefix + "_" + name: value for name, value in NAMES.items()} | emitter.values
    return _Written(source, new, tuple(map(_names, emitter.blocks)), tuple(emitter.sequences), values)


def _names(block: Block) -> BlockNames:
    conv = block.conv.call
    norm = block.norm.call if block.norm is not None else None
    activation = block.activation.call if block.activation is not None else None
    assert conv is not None
    calls_function = activation is not None and activation.module is None
    path = activation.path if activation is not None else None
    if norm is not None and block.own == "in":
        path = f"{norm.path}.act"
    return BlockNames(
        conv.path, norm.path if norm is not None else None, path, calls_function, block.add is not None, block.outside
    )


def _methods_called(source: Source, kind: type[nn.Module]) -> Iterator[str]:
    """Methods of the module's own that a method calls: ``self.forward_features(x)``."""
    arguments = [*source.tree.args.posonlyargs, *source.tree.args.args]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == arguments[0].arg:
            found = inspect.getattr_static(kind, node.attr, None)
            if isinstance(found, FunctionType) and not hasattr(nn.Module, node.attr):
                yield node.attr


def _of_sequence(module: nn.Module) -> _Written:
    written = _rewrite(module, _sequence_source(module))
    (check,) = ast.parse("if not _fk_has_shape(self, _fk_shape):\n    return _fk_own_forward(self, input)").body
    written.tree.body.insert(0, ast.fix_missing_locations(ast.copy_location(check, written.tree)))
    return replace(written, sequences=tuple(nested(module)), values={**written.values, "_fk_shape": shape(module)})


def _sequence_source(module: nn.Module) -> Source:
    """The forward of a sequence, with its layers one by one while they are as many as now."""
    function = nn.Sequential.forward
    assert isinstance(function, FunctionType)
    lines = ["def forward(self, input):"]
    for path, _ in members(module):
        callee = "".join(f"._modules[{name!r}]" for name in path)
        lines.append(f"    input = self{callee}(input)")
    (tree,) = ast.parse("\n".join([*lines, "    return input"])).body
    assert isinstance(tree, ast.FunctionDef)
    for node in ast.walk(tree):
        if hasattr(node, "lineno"):
            placed: Any = node
            placed.lineno = placed.end_lineno = function.__code__.co_firstlineno
    return Source(function, tree)
