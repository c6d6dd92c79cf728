"""Blocks in the steps of a forward: a convolution and the layers behind it, with nothing else between them.

A block replaces its steps only if nothing else reads the values between them. It may reach over tests that are
not met now, such as ``if self.downsample is not None``: they are asked again ahead of it.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from freezekit.fusion.layers import ACTIVATIONS
from freezekit.fusion.norms import has_activation
from freezekit.fusion.patterns import LayerCall
from freezekit.fusion.sequences import Shape, nested, shape
from freezekit.fusion.steps import Statement


@dataclass(frozen=True)
class Condition:
    """What is asked ahead of a block: a test of the forward's, or whether a child is what it was taken for."""

    kind: (
        str  # "test", "sequence" or "list" (whose children are held), "identity", "drops nothing" (a norm), "torch.add"
    )
    node: ast.expr
    taken: bool = True
    shape: Shape | tuple[str, ...] = ()
    children: str = ""


@dataclass(eq=False)
class Block:
    """Steps that may run as one operator.

    Attributes:
        items: what it stands for.
        steps: what the items do while the conditions hold.
        residual: the name of what is added.
        into: the block whose result the sum is written into, where the forward says so; nothing else read that result.
        final: the name that is set; None if the block returns.
        own: of a norm with an activation of its own: "in" if that is of the block, "behind" if it runs behind it,
            "nothing" if it does nothing; "" of other norms.
        flag: the name of a variable that is to say whether it ran; "" if nothing asks.
        outside: the path of a norm that reads the result and could not be taken in; "" without one.
    """

    conv: Statement
    final: str | None
    items: list[Statement] = field(default_factory=list)
    steps: list[Statement] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    norm: Statement | None = None
    add: Statement | None = None
    residual: str = ""
    into: Block | None = None
    activation: Statement | None = None
    closed: bool = False
    own: str = ""
    flag: str = ""
    outside: str = ""


@dataclass(eq=False)
class Opened:
    """Items with a sequence at their head, and the steps that they are while the conditions hold."""

    items: list[Statement]
    sequences: list[str]
    steps: list[Statement]
    conditions: list[Condition]
    units: list[Unit] = field(default_factory=list)


Unit = Block | Opened | Statement


class Finder:
    """Finds blocks in a list of steps.

    Args:
        uses, captured: as for `Steps`; names that are missing are read once.
        unfold: the steps that the call of a sequence is; None if neither sequences nor tests are looked into.
    """

    def __init__(
        self,
        items: list[Statement],
        uses: Counter[str],
        captured: frozenset[str],
        unfold: Callable[[Statement], list[Statement]] | None,
    ) -> None:
        self.items, self.uses, self.captured, self.unfold = items, uses, captured, unfold

    def units(self, previous: Block | None = None) -> list[Unit]:
        """The list as blocks and what is between them; `previous` is the block right before it."""
        found: list[Unit] = []
        i = 0
        while i < len(self.items):
            unit = self.block(i, previous) or self._opened(i, previous) or self.items[i]
            found.append(unit)
            previous = unit if isinstance(unit, Block) else None
            i += 1 if isinstance(unit, Statement) else len(unit.items)
        return found

    def block(self, first: int, previous: Block | None = None) -> Block | None:
        """The longest block that begins with an item."""
        growing: Block | None = None
        best: Block | None = None
        conditions: list[Condition] = []
        for i in range(first, len(self.items)):
            item = self.items[i]
            if item.kind == "if":
                if self.unfold is None or (growing is None and not item.body):
                    break
                assert isinstance(item.node, ast.If)
                conditions.append(Condition("test", item.node.test, item.taken))
            for step in item.body if item.kind == "if" else [item]:
                if growing is None:
                    if step.kind != "conv":
                        return best
                    growing = Block(step, step.target, steps=[step])
                elif not _joins(growing, step, conditions, previous if self.unfold else None):
                    return best
            if growing is not None and self._hidden(growing, self.items[first : i + 1]):
                best = replace(
                    growing, items=self.items[first : i + 1], steps=list(growing.steps), conditions=list(conditions)
                )
            if growing is None or growing.closed or growing.final is None:
                break
        return best

    def _opened(self, i: int, previous: Block | None) -> Opened | None:
        """A sequence whose last convolution forms a block with what follows it, or a loop over children."""
        item, conditions = self.items[i], []
        if self.unfold is None:
            return None
        if item.kind == "if" and len(item.body) == 1:
            assert isinstance(item.node, ast.If)
            conditions.append(Condition("test", item.node.test, item.taken))
            item = item.body[0]
        if item.kind == "sequence" and item.target is not None:
            assert item.call is not None
            assert item.call.callee is not None
            assert item.call.module is not None
            steps, paths = self.unfold(item), [item.call.path]
            inside = shape(item.call.module)
            conditions.append(Condition("sequence", item.call.callee, shape=inside, children=item.children))
            paths += [f"{item.call.path}.{path}" for path in nested(item.call.module)]
        elif item.kind == "loop" and not conditions:
            assert item.over is not None
            node, path, module = item.over
            conditions.append(Condition("list", node, shape=tuple(module._modules), children=item.children))
            steps, paths = list(item.body), [path]
        else:
            return None
        more = len(steps)
        last = max((k for k, step in enumerate(steps) if step.kind == "conv"), default=None)
        if last is None:
            return None
        steps += self.items[i + 1 :]
        block = Finder(steps, self.uses, self.captured, self.unfold).block(last, previous if last == 0 else None)
        end = max(more if item.kind == "loop" else 0, 0 if block is None else last + len(block.items))
        if end <= more and item.kind == "sequence":
            return None
        return Opened(self.items[i : i + 1 + end - more], paths, steps[:end], conditions)

    def _hidden(self, block: Block, items: list[Statement]) -> bool:
        """Whether nothing else reads what the block's steps set, apart from its result."""
        names = {str(step.target) for step in block.steps} - {str(block.final)}
        if block.final is None:  # nothing is read once the function has returned, but by functions in it
            return not names & self.captured
        inside = Counter(name for item in items for name in names_read(item.node))
        return not names & self.captured and all(self.uses.get(name, 1) <= inside[name] for name in names)


def _joins(block: Block, step: Statement, conditions: list[Condition], previous: Block | None) -> bool:
    """Takes a step into a block, if it may; `previous` is the block right ahead."""
    if block.closed or block.final is None:
        return False
    if step.kind == "add":
        joins = _adds(block, step, conditions, previous)
    elif step.value != block.final or step.call is None:
        return False
    elif step.kind == "norm":
        joins = block.norm is None and block.add is None
        block.norm = step
        if has_activation(step.call.module):
            _takes_own_activation(block, step.call, conditions)
    elif step.kind == "identity":
        assert step.call.callee is not None
        conditions.append(Condition("identity", step.call.callee))
        joins = True
    else:
        joins = step.kind == "activation"
        block.activation, block.closed = step, True
    block.final = step.target
    block.steps.append(step)
    return joins


def _takes_own_activation(block: Block, call: LayerCall, conditions: list[Condition]) -> None:
    """Takes in what a norm does beyond normalising."""
    assert call.callee is not None
    assert call.module is not None
    conditions.append(Condition("drops nothing", call.callee))
    if type(call.module.act) is nn.Identity:
        conditions.append(Condition("identity", ast.Attribute(call.callee, "act", ast.Load())))
        block.own = "nothing"
    else:
        block.own, block.closed = "in" if type(call.module.act) in ACTIVATIONS else "behind", True


def _adds(block: Block, step: Statement, conditions: list[Condition], previous: Block | None) -> bool:
    left, right = step.value == block.final, step.other == block.final
    other = step.other if left else step.value
    if block.add is not None or left is right or any(other == one.target for one in block.steps):
        return False
    if step.in_place and right:
        if previous is None or previous.final != other:
            return False
        block.into = previous
    block.add, block.residual = step, other
    if step.function is not None:
        conditions.append(Condition("torch.add", step.function))
    return True


def names_read(node: ast.AST) -> Iterator[str]:
    """The names that are read in a piece of source, as often as they are."""
    for one in ast.walk(node):
        if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Store):
            yield one.id
        elif isinstance(one, ast.AugAssign) and isinstance(one.target, ast.Name):
            yield one.target.id


def names_set(node: ast.AST) -> Iterator[str]:
    for one in ast.walk(node):
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
            yield one.id
