"""What reads what in a list of blocks, so that blocks can pass values to each other that nothing else sees.

Two things are worth it. A result that only blocks read may have the layout that kernels prefer. And of several blocks
that read one value, the first hands it on to the next, whose gradient it then adds inside its own dgrad; between them
there may be blocks only, so that nothing can write to the value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from freezekit.fusion.blocks import Block, Statement, names_read, names_set


@dataclass
class Place:
    """What a block does for others, and gets from them. Names are those of variables.

    Attributes:
        base, residual: what it reads.
        hands_on: gets its input, for the next reader.
        inner: whether blocks alone read its result.
        layout: where its result is one of those, gets the layout that torch's layers would have given it.
        base_layout: that of its input.
        restore: (name, layout) of results that its layers need in torch's layout.
        reset: (variable, name) of values handed on that its layers, which may write to them, make unsafe.
    """

    base: str
    residual: str
    hands_on: str = ""
    inner: bool = False
    layout: str = ""
    base_layout: str = ""
    restore: list[tuple[str, str]] = field(default_factory=list)
    reset: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Value:
    """A value: the blocks that read it by the name they do, where nothing stood between; whether others may read it."""

    maker: Block | None = None
    readers: list[tuple[Block, int]] = field(default_factory=list)
    open: bool = False


def places(units: list[Block | Statement], whole: bool, fresh: Iterator[str]) -> dict[Block, Place]:
    """A place for each block of a list; `whole`: nothing is read of the list once it has run."""
    held: dict[str, _Value] = {}  # by name
    names: list[dict[str, _Value]] = []  # `held` as each unit finds it
    values: list[_Value] = []
    barriers = 0

    def value(name: str) -> _Value:
        if name not in held:
            held[name] = _Value(open=True)
            values.append(held[name])
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
                    held[step.target] = _Value(
                        maker=unit if step.target == unit.final and unit.own != "behind" else None
                    )
                    values.append(held[step.target])
        elif unit.kind == "copy" and unit.target is not None:
            value(unit.value).open = True
            held[unit.target] = held[unit.value]
        else:
            barriers += 1
            for name in names_read(unit.node):
                value(name).open = True
            for name in names_set(unit.node):
                held[name] = _Value(open=True)
                values.append(held[name])
    if not whole:
        for one in held.values():
            one.open = True
    return _assigned(units, values, names, fresh)


def _assigned(
    units: list[Block | Statement], values: list[_Value], names: list[dict[str, _Value]], fresh: Iterator[str]
) -> dict[Block, Place]:
    order = {unit: i for i, unit in enumerate(units) if isinstance(unit, Block)}
    found = {unit: Place(unit.conv.value, unit.residual) for unit in order}
    for one in values:
        if one.maker is not None and one.readers and not one.open:
            found[one.maker].inner, found[one.maker].layout = True, next(fresh)
            for reader, _ in one.readers:
                name = next(name for name, held in names[order[reader]].items() if held is one)
                found[reader].restore.append((name, found[one.maker].layout))
                if reader.conv.value == name:
                    found[reader].base_layout = found[one.maker].layout
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
