"""A forward's statements taken apart into steps of one call or addition each, where layers of a block are among them.

What is evaluated first stays first: where a call is taken out of an expression, everything that Python evaluates before
it is taken out too, but for names, constants and functions. Statements that say nothing of layers stay as they are.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from freezekit.fusion.patterns import LayerCall, Lookup, Unknown, as_sum, kind_of
from freezekit.fusion.sequences import is_iterated_plainly, members

Node = TypeVar("Node", bound=ast.AST)


@dataclass(eq=False)
class Statement:
    """A statement, and what it does where that is known.

    Attributes:
        node: the statement.
        kind: "conv", "norm", "activation", "identity", "sequence", "module" (any other child), "add", "copy" (one name
            is another), "if" (a test that evaluating does not change), "loop" (over children) or "" for all else.
        target: the name that it sets; None if it returns.
        value: the name that it reads; of an addition, the left one.
        call: of layers.
        other: of an addition, the right name.
        in_place: whether it adds into the left one.
        function: of an addition, the function that is called.
        taken: of a test, whether it is met now.
        body: of a test, the steps that it leads to now; of a loop, all its rounds.
        over: of a loop, the module whose children it is over.
        children: of a sequence or a loop, the variable that holds the children while they run one by one.
    """

    node: ast.stmt
    kind: str = ""
    target: str | None = None
    value: str = ""
    call: LayerCall | None = None
    other: str = ""
    in_place: bool = False
    function: ast.expr | None = None
    taken: bool = False
    body: list[Statement] = field(default_factory=list)
    over: tuple[ast.expr, str, nn.Module] | None = None
    children: str = ""


class Steps:
    """Takes statements apart.

    Args:
        uses: how often each name is read in the function.
        captured: names that functions in it read.
        fresh: names that the function does not know.

    Attributes:
        made: those of them that stand for what had no name; each is read once.
    """

    def __init__(self, lookup: Lookup, uses: Counter[str], captured: frozenset[str], fresh: Iterator[str]) -> None:
        self.lookup, self.uses, self.captured, self.fresh = lookup, uses, captured, fresh
        self.made: set[str] = set()

    def _new(self) -> str:
        name = next(self.fresh)
        self.made.add(name)
        return name

    def of(self, statements: list[ast.stmt]) -> list[Statement]:
        return [step for statement in statements for step in self._of_one(statement)]

    def _of_one(self, node: ast.stmt) -> list[Statement]:
        if isinstance(node, ast.If):
            return [self._of_test(node)]
        if isinstance(node, ast.For):
            return [self._of_loop(node)]
        before: list[Statement] = []
        if any(isinstance(one, ast.NamedExpr) for one in ast.walk(node)):  # names change while it is evaluated
            return [Statement(node)]
        if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and isinstance(node.target, ast.Name):
            other = self._name(self._flat(node.value, before), before, node) if self._speaks(node.value) else node.value
            if not isinstance(other, ast.Name):
                return [*before, Statement(node)]
            name = node.target.id
            same = node if other is node.value else ast.AugAssign(node.target, node.op, other)
            return [*before, Statement(_at(same, node), "add", name, name, other=other.id, in_place=True)]
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)) or node.value is None:
            return [Statement(node)]
        target = _target(node)
        if isinstance(node.value, ast.Name):
            return [Statement(node, "copy" if target and isinstance(node, ast.Assign) else "", target, node.value.id)]
        if not self._speaks(node.value):
            return [Statement(node)]
        value = self._flat(node.value, before)
        if isinstance(value, ast.Name) and before and (target is not None or isinstance(node, ast.Return)):
            last = before[-1]
            assert isinstance(last.node, ast.Assign) and last.target == value.id  # noqa: PT018
            self.made.discard(value.id)
            whole = ast.Return(last.node.value) if target is None else _assign(target, last.node.value)
            last.node, last.target = _at(whole, node), target
            return before
        return [*before, Statement(_at(_with_value(node, value), node))]

    def unfold(self, item: Statement) -> list[Statement]:
        """The steps that the call of a plain sequence is."""
        call, value, steps = item.call, item.value, []
        assert call is not None
        assert call.callee is not None
        assert call.module is not None
        inside = members(call.module)
        item.children = item.children or self._held(call.path, call.module)
        for i, (path, module) in enumerate(inside):
            callee = _child(ast.Name(item.children, ast.Load()), path[0])
            for name in path[1:]:
                callee = _child(ast.Attribute(callee, "_modules", ast.Load()), name)
            target = item.target if i == len(inside) - 1 else self._new()
            result = ast.Call(callee, [ast.Name(value, ast.Load())], [])
            node = ast.Return(result) if target is None else _assign(target, result)
            found = LayerCall(
                kind_of(module), result.args[0], callee, ".".join(filter(None, (call.path, *path))), module
            )
            steps.append(Statement(_at(node, item.node), found.kind, target, value, found))
            value = str(target)
        return steps

    def _held(self, path: str, module: nn.Module) -> str:
        """A name for a module's children."""
        name = next(self.fresh)
        self.lookup.held[name] = path, module
        return name

    def _of_test(self, node: ast.If) -> Statement:
        try:
            taken = self.lookup.truth(node.test)
        except Unknown:
            return Statement(node)
        body = node.body if taken else node.orelse
        return Statement(node, "if", taken=taken, body=self.of(body))

    def _of_loop(self, node: ast.For) -> Statement:
        """A loop over the children of a list or a sequence, where nothing but their calls depends on the round."""
        found = self.lookup.child(node.iter)
        if found is None or not is_iterated_plainly(found[1]) or not isinstance(node.target, ast.Name) or node.orelse:
            return Statement(node)
        path, over = found
        inside = [one for statement in node.body for one in ast.walk(statement)]
        reads = [one for one in inside if isinstance(one, ast.Name) and one.id == node.target.id]
        simple = all(isinstance(statement, (ast.Assign, ast.AugAssign)) for statement in node.body)
        if (
            not simple
            or len(reads) != self.uses[node.target.id]
            or node.target.id in self.captured
            or not any(kind_of(m) == "conv" for m in over.children())
        ):
            return Statement(node)
        body, children = [], self._held(path, over)
        for name in over._modules:
            callee = _child(ast.Name(children, ast.Load()), name)
            for statement in node.body:
                made = _replaced(statement, {id(one): callee for one in reads})
                body += self._of_one(_at(made, statement))
        return Statement(node, "loop", body=body, over=(node.iter, path, over), children=children)

    def _speaks(self, node: ast.expr) -> bool:
        """Whether there is a layer or an addition where it can be taken out."""
        if self._meaning(node):
            return True
        return any(self._speaks(part) for part in _parts(node))

    def _meaning(self, node: ast.expr) -> bool:
        call = self.lookup.call(node)
        if call is not None:
            return call.kind != "module"
        found = as_sum(self.lookup, node)
        return found is not None and all(isinstance(part, ast.Name) for part in (found.left, found.right))

    def _flat(self, node: ast.expr, steps: list[Statement]) -> ast.expr:
        """What is left of an expression when its layers and additions are taken out into steps."""
        if not self._speaks(node):
            return node
        call = self.lookup.call(node)
        if call is not None:
            return self._flat_call(node, call, steps)
        found = as_sum(self.lookup, node)
        if found is not None and not (found.in_place and not isinstance(found.left, ast.Name)):
            left, right = self._all([found.left, found.right], steps, names=True)
            assert isinstance(left, ast.Name)
            assert isinstance(right, ast.Name)
            same = _replaced(node, {id(found.left): left, id(found.right): right})
            step = Statement(ast.Pass(), "add", value=left.id, other=right.id, in_place=found.in_place)
            step.function = found.function
            return self._out(same, steps, step, node)
        parts = _parts(node)
        return _replaced(node, {id(a): b for a, b in zip(parts, self._all(parts, steps), strict=True)})

    def _flat_call(self, node: ast.expr, call: LayerCall, steps: list[Statement]) -> ast.expr:
        argument = self._name(self._flat(call.argument, steps), steps, node)
        same = _replaced(node, {id(call.argument): argument})
        return self._out(same, steps, Statement(ast.Pass(), call.kind, value=argument.id, call=call), node)

    def _all(self, parts: list[ast.expr], steps: list[Statement], names: bool = False) -> list[ast.expr]:
        """Parts that are evaluated in this order; what comes before a part that is taken out is taken out too."""
        last = max((i for i, part in enumerate(parts) if self._speaks(part)), default=-1)
        result = []
        for i, part in enumerate(parts):
            flat = self._flat(part, steps)
            early = i < last and not isinstance(flat, (ast.Name, ast.Constant))
            result.append(self._name(flat, steps, part) if names or early else flat)
        return result

    def _name(self, node: ast.expr, steps: list[Statement], where: ast.AST) -> ast.Name:
        if isinstance(node, ast.Name):
            return node
        name = self._out(node, steps, Statement(ast.Pass()), where)
        assert isinstance(name, ast.Name)
        return name

    def _out(self, node: ast.expr, steps: list[Statement], step: Statement, where: ast.AST) -> ast.expr:
        name = self._new()
        step.node, step.target = _at(_assign(name, node), where), name
        steps.append(step)
        return _at(ast.Name(name, ast.Load()), where)


def _parts(node: ast.expr) -> list[ast.expr]:
    """The parts of an expression that are evaluated whenever it is, in this order; functions that are called aside."""
    if isinstance(node, (ast.Call, ast.Tuple, ast.List)):
        inside = node.args if isinstance(node, ast.Call) else node.elts
        if any(isinstance(part, ast.Starred) for part in inside):
            return []
    if isinstance(node, ast.Call):
        called = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        return [*called, *node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, (ast.Tuple, ast.List)):
        return list(node.elts)
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return list(node.values)
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        return [node.value]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    return []


def _replaced(node: Node, new: dict[int, ast.expr]) -> Node:
    """A copy of a piece of source with other parts."""

    class Replace(ast.NodeTransformer):
        def visit(self, one: ast.AST) -> Any:
            if id(one) in new:
                return new[id(one)]
            return self.generic_visit(_shallow(one))

    result: Any = Replace().visit(node)
    return result


def _shallow(node: ast.AST) -> ast.AST:
    fields = {name: list(value) if isinstance(value, list) else value for name, value in ast.iter_fields(node)}
    return ast.copy_location(type(node)(**fields), node)


def _child(children: ast.expr, name: str) -> ast.expr:
    return ast.Subscript(children, ast.Constant(name), ast.Load())


def _assign(name: str, value: ast.expr) -> ast.Assign:
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _with_value(node: ast.stmt, value: ast.expr) -> ast.stmt:
    made = _shallow(node)
    assert isinstance(made, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr))
    made.value = value
    return made


def _at(node, where):  # type: ignore[no-untyped-def]
    """A node that was made, at the place in the file of another one."""
    ast.copy_location(node, where)
    return ast.fix_missing_locations(node)


def _target(node: ast.stmt) -> str | None:
    """The one name that an assignment sets."""
    if isinstance(node, ast.AnnAssign):
        return node.target.id if isinstance(node.target, ast.Name) else None
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None
