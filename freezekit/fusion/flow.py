"""What reads what in a list of blocks, so that gradients are added inside dgrads.

Of several blocks that read one value, the first hands it on to the next, whose gradient it then adds inside its own
dgrad; between them there may be blocks only, so that nothing can write to the value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from freezekit.fusion.blocks import Block, Statement, names_set


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


@dataclass
class _Value:
    """A value: the blocks that read it, each with the number of other statements before it."""

    readers: list[tuple[Block, int]] = field(default_factory=list)


def places(units: list[Block | Statement], fresh: Iterator[str]) -> dict[Block, Place]:
    """A place for each block of a list."""
    held: dict[str, _Value] = {}  # by name
    names: list[dict[str, _Value]] = []  # `held` as each unit finds it
    values: list[_Value] = []
    barriers = 0

    def new() -> _Value:
        values.append(_Value())
        return values[-1]

    def value(name: str) -> _Value:
        if name not in held:
            held[name] = new()
        return held[name]

    for unit in units:
        names.append({})
        if isinstance(unit, Block):
            for name in filter(None, (unit.conv.value, unit.residual)):
                if (unit, barriers) not in value(name).readers:
                    value(name).readers.append((unit, barriers))
            names[-1] = dict(held)
            for step in unit.steps:
                if step.target is not None:
                    held[step.target] = new()
        elif unit.kind == "copy" and unit.target is not None:
            held[unit.target] = value(unit.value)
        else:
            barriers += 1
            for name in names_set(unit.node):
                held[name] = new()
    return _assigned(units, values, names, fresh)


def _assigned(
    units: list[Block | Statement], values: list[_Value], names: list[dict[str, _Value]], fresh: Iterator[str]
) -> dict[Block, Place]:
    order = {unit: i for i, unit in enumerate(units) if isinstance(unit, Block)}
    found = {unit: Place(unit.conv.value, unit.residual) for unit in order}
    for one in values:
        for (first, before), (second, after) in zip(one.readers, one.readers[1:], strict=False):
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
