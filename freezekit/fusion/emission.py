"""The statements of a rewritten forward."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from freezekit.fusion.blocks import Block, Condition, Finder, Opened, Unit, names_read, names_set
from freezekit.fusion.steps import Statement, Steps


class Emitter:
    """Writes the statements of one function.

    Args:
        steps: takes its statements apart.
        uses, captured: as for `Steps`.
        prefix: of names that it does not know; `block.NAMES` follow ``prefix_``.

    Attributes:
        blocks: all that were found.
        sequences: paths of the sequences whose layers are called one by one.
        values: what new names stand for, beyond those of `freezekit.fusion.block`.
    """

    def __init__(self, steps: Steps, uses: Counter[str], captured: frozenset[str], prefix: str) -> None:
        self.steps, self.uses, self.captured, self.prefix = steps, uses, captured, prefix
        self.blocks: list[Block] = []
        self.sequences: list[str] = []
        self.values: dict[str, Any] = {}

    def body(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """A list of statements, rewritten."""
        units = self._units(self.steps.of(statements), far=True)
        flat = list(_flat(units))
        for unit in flat:
            if isinstance(unit, Block) and unit.into is not None:
                unit.into.flag = next(self.steps.fresh)
        for i, unit in enumerate(flat):
            if isinstance(unit, Block) and unit.norm is None and unit.final is not None:
                unit.outside = self._norm_of(unit.final, flat[i + 1 :])
        return self._written(units, places(flat, self.steps.fresh), report=True)

    def _norm_of(self, name: str, units: list[Block | Statement]) -> str:
        """The path of the norm that a result goes into, for all that its name says."""
        for unit in units:
            for step in unit.steps if isinstance(unit, Block) else [unit]:
                for node in ast.walk(step.node):
                    child = self.steps.lookup.child(node.func) if isinstance(node, ast.Call) and node.args else None
                    if child is not None and "norm" in type(child[1]).__name__.lower():
                        argument = node.args[0]  # type: ignore[attr-defined]
                        if isinstance(argument, ast.Name) and argument.id == name:
                            return child[0]
                if name in names_set(step.node):
                    return ""
        return ""

    def _units(self, items: list[Statement], far: bool, previous: Block | None = None) -> list[Unit]:
        units = Finder(items, self.uses, self.captured, self.steps.unfold if far else None).units(previous)
        for before, unit in zip([previous, *units], units, strict=False):
            if isinstance(unit, Opened):
                unit.units = self._units(unit.steps, far, before if isinstance(before, Block) else None)
        return units

    def _near(self, items: list[Statement]) -> list[ast.stmt]:
        """Items without a look into sequences or over tests."""
        return self._written(self._units(items, far=False), {}, report=False)

    def _written(self, units: list[Unit], found: dict[Block, Place], report: bool) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        for unit in units:
            if isinstance(unit, Statement):
                result += self._statement(unit, report)
            elif isinstance(unit, Opened):
                result.append(self._opened(unit, found))
            else:
                if report:
                    self.blocks.append(unit)
                result += self._block(unit, found.get(unit) or Place(unit.conv.value, unit.residual))
        return result

    def _statement(self, step: Statement, report: bool) -> list[ast.stmt]:
        """A statement that is of no block; lists of statements in it are rewritten on their own."""
        node = step.node
        if report and isinstance(node, (ast.If, ast.For, ast.While, ast.With)):
            fields = dict(ast.iter_fields(node))
            for name in ("body", "orelse"):
                if fields.get(name):
                    fields[name] = self.body(fields[name])
            node = ast.copy_location(type(node)(**fields), node)
        return [node, *self._forget(names_read(step.node), step.node)]

    def _forget(self, names: Iterable[str], node: ast.stmt) -> list[ast.stmt]:
        """Lets go of what had no name, as an expression does."""
        if isinstance(node, ast.Return):
            return []
        return self._text([f"{name} = None" for name in dict.fromkeys(names) if name in self.steps.made], node)

    def _opened(self, unit: Opened, found: dict[Block, Place]) -> ast.stmt:
        self.sequences += unit.sequences
        where = unit.items[0].node
        written = self._written(unit.units, found, report=True)
        return self._if(self._all(unit.conditions), written, self._near(unit.items), where)

    def _block(self, block: Block, place: Place) -> list[ast.stmt]:
        where, result = block.conv.node, next(self.steps.fresh)
        call = f"{result} = {self._call(block, place)}"
        conditions = self._all(block.conditions, block.into.flag if block.into is not None else "")
        lines = [f"{result} = None", f"if {conditions}:\n    {call}"] if conditions else [call]
        fails = [f"{place.hands_on} = {block.conv.value}"] if place.hands_on else []
        fails += [f"{variable} = {name}" for variable, name in place.reset]
        works = [f"{result}, {place.hands_on} = {result}"] if place.hands_on else []
        if block.flag:
            fails.append(f"{block.flag} = False")
            works.append(f"{block.flag} = True")
        if block.own == "behind":
            assert block.norm is not None
            works.append(f"{result} = {_callee(block.norm)}.act({result})")
        works += ["return " + result] if block.final is None else [f"{block.final} = {result}", f"{result} = None"]
        layers = self._text(fails, where)
        if block.into is not None or any(condition.kind == "test" for condition in block.conditions):
            layers += self._near(block.items)
        else:
            for step in block.steps:
                layers += [step.node, *self._forget(names_read(step.node), step.node)]
        written = self._text(lines, where)
        written.append(self._if(f"{result} is None", layers, self._text(works, where), where))
        if block.final is not None:
            used = {block.conv.value, block.residual} - {block.final}
            written += self._forget(used, where)
            handed = [name for name in (place.base, place.residual) if name not in (block.conv.value, block.residual)]
            written += self._text([f"{name} = None" for name in handed], where)
        return written

    def _call(self, block: Block, place: Place) -> str:
        absent = self._own("absent")
        parts = [place.base, _callee(block.conv), absent, absent, place.residual or absent]
        if block.norm is not None:
            assert block.norm.call is not None
            parts[2] = _callee(block.norm)
            if block.own == "in":
                parts[3] = f"{parts[2]}.act"
        if block.activation is not None:
            assert block.activation.call is not None
            parts[3] = _callee(block.activation) or repr(block.activation.call.path)
        if block.own:
            parts.append("owns=True")
        while parts[-1] == absent:
            parts.pop()
        if place.hands_on:
            parts.append("shares=True")
        return f"{self._own('fused')}({', '.join(parts)})"

    def _all(self, conditions: list[Condition], flag: str = "") -> str:
        terms = [flag] if flag else []
        for condition in conditions:
            text = ast.unparse(condition.node)
            if condition.kind == "test":
                terms.append(f"({text})" if condition.taken else f"not ({text})")
            elif condition.kind == "identity":
                terms.append(f"{self._own('is_identity')}({text})")
            elif condition.kind == "drops nothing":
                terms.append(f"{self._own('drops_nothing')}({text})")
            elif condition.kind == "torch.add":
                terms.append(f"{text} is {self._own('torch_add')}")
            else:
                name = next(self.steps.fresh)
                self.values[name] = condition.shape
                asked = self._own(f"children_of_{condition.kind}")
                terms.append(f"({condition.children} := {asked}({text}, {name}))")
        return " and ".join(terms)

    def _own(self, name: str) -> str:
        return f"{self.prefix}_{name}"

    def _if(self, test: str, body: list[ast.stmt], otherwise: list[ast.stmt], where: ast.stmt) -> ast.stmt:
        (node,) = self._text([f"if {test}: pass"], where)
        assert isinstance(node, ast.If)
        node.body, node.orelse = body, otherwise
        return node

    def _text(self, lines: list[str], where: ast.stmt) -> list[ast.stmt]:
        """Statements that have no place in the file: they get another one's."""
        made = ast.parse("\n".join(lines)).body
        for statement in made:
            for node in ast.walk(statement):
                if hasattr(node, "lineno"):
                    ast.copy_location(node, where)
        return made


def _callee(step: Statement) -> str:
    assert step.call is not None
    return ast.unparse(step.call.callee) if step.call.callee is not None else ""


def _flat(units: list[Unit]) -> Iterator[Block | Statement]:
    """Blocks and other steps in order; behind what a sequence was opened for, a step that stands for other ways."""
    for unit in units:
        if isinstance(unit, Opened):
            yield from _flat(unit.units)
            yield Statement(ast.Pass())
        else:
            yield unit


@dataclass
class Place:
    """What a block does for others, and gets from them. Names are those of variables.

    Attributes:
        base, residual: what it reads.
        hands_on: gets its input, for the next reader.
        reset: (variable, name) of values handed on that its layers, which may write to them, make unsafe.
    """

    base: str
    residual: str
    hands_on: str = ""
    reset: list[tuple[str, str]] = field(default_factory=list)


_Readers = list[tuple[Block, int]]  # of a value: the blocks that read it, each with the number of barriers before it


def places(units: list[Block | Statement], fresh: Iterator[str]) -> dict[Block, Place]:
    """A place for each block of a list, so that gradients are added inside dgrads.

    Of several blocks that read one value, the first hands it on to the next, whose gradient it then adds inside its own
    dgrad; between them there may be blocks only, so that nothing can write to the value.
    """
    held: dict[str, _Readers] = {}  # by name
    names: list[dict[str, _Readers]] = []  # `held` as each unit finds it
    values: list[_Readers] = []
    barriers = 0

    def new() -> _Readers:
        values.append([])
        return values[-1]

    def readers(name: str) -> _Readers:
        if name not in held:
            held[name] = new()
        return held[name]

    for unit in units:
        names.append({})
        if isinstance(unit, Block):
            for name in filter(None, (unit.conv.value, unit.residual)):
                if (unit, barriers) not in readers(name):
                    readers(name).append((unit, barriers))
            names[-1] = dict(held)
            for step in unit.steps:
                if step.target is not None:
                    held[step.target] = new()
        elif unit.kind == "copy" and unit.target is not None:
            held[unit.target] = readers(unit.value)
        else:
            barriers += 1
            for name in names_set(unit.node):
                held[name] = new()
    return _assigned(units, values, names, fresh)


def _assigned(
    units: list[Block | Statement], values: list[_Readers], names: list[dict[str, _Readers]], fresh: Iterator[str]
) -> dict[Block, Place]:
    order = {unit: i for i, unit in enumerate(units) if isinstance(unit, Block)}
    found = {unit: Place(unit.conv.value, unit.residual) for unit in order}
    for one in values:
        for (first, before), (second, after) in pairwise(one):
            if before != after or names[order[first]].get(first.conv.value) is not one:
                continue  # it is the input that is handed on
            variable = found[first].hands_on = next(fresh)
            for field_name in ("base", "residual"):
                name = second.conv.value if field_name == "base" else second.residual
                if names[order[second]].get(name) is one:
                    setattr(found[second], field_name, variable)
            for block, i in order.items():
                if order[first] < i < order[second]:
                    name = next(name for name, held in names[i].items() if held is one)
                    found[block].reset.append((variable, name))
    return found
