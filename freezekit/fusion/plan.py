"""A forward rewritten with fused blocks, and the question whether it still says what the module's own forward says."""

from __future__ import annotations

import linecache
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from freezekit.fusion.block import block, inner_layout, outer_layout, shared_block
from freezekit.fusion.layers import ACTIVATION_CALLS
from freezekit.fusion.patterns import Chain, find_chains
from freezekit.fusion.tracer import Reads, Untraceable, is_plain_sequence, original_class, trace

_counter = iter(range(10**9))


@dataclass(frozen=True)
class BlockNames:
    """One block's layers, as paths from the module; an activation is a path or the kind of a function."""

    conv: str
    norm: str | None
    activation: str | None
    calls_function: bool
    adds: bool


@dataclass(frozen=True)
class Plan:
    """What a module runs in place of its own forward.

    Attributes:
        holds: whether everything that the module's forward was seen to depend on is as it was.
        run: the rewritten forward, or the module's own where there is nothing to fuse.
        blocks: what it fuses.
        sequences: paths of the sequences that it runs the layers of, instead of calling them.
        reason: why nothing is rewritten; "" otherwise.
        key: equal for plans that are the same.
    """

    holds: Callable[[nn.Module], bool]
    run: Callable[..., Any]
    blocks: tuple[BlockNames, ...]
    sequences: tuple[str, ...] = ()
    reason: str = ""
    key: tuple[object, ...] = ()


def make_plan(module: nn.Module, kind: type[nn.Module]) -> Plan:
    """Traces `kind.forward` on `module`, fuses what it can, and never fails: a plan may be to run what was there."""
    try:
        traced = trace(module, kind)
    except Untraceable as error:
        reads: Reads = error.reads  # type: ignore[attr-defined]
        return _unfused(reads, kind, str(error))
    chains = find_chains(module, traced.graph)
    if not chains:
        return _unfused(traced.reads, kind, "its forward calls no convolution")
    names = tuple(_names(chain) for chain in chains)
    holds, condition = _holds(traced.reads)
    code = _rewrite(traced.graph, chains).python_code("self")
    run = _define(code.src, "forward", code.globals, kind.__name__)
    return Plan(holds, run, names, tuple(traced.reads.sequences), key=(code.src, *condition))


def _unfused(reads: Reads, kind: type[nn.Module], reason: str) -> Plan:
    holds, condition = _holds(reads)
    return Plan(holds, kind.forward, (), reason=reason, key=(reason, *condition))


def _names(chain: Chain) -> BlockNames:
    norm = str(chain.norm.target) if chain.norm is not None else None
    calls_function = chain.activation is not None and chain.activation.op != "call_module"
    return BlockNames(str(chain.conv.target), norm, _activation(chain), calls_function, chain.add is not None)


def _activation(chain: Chain) -> str | None:
    node = chain.activation
    if node is None:
        return None
    return str(node.target) if node.op == "call_module" else ACTIVATION_CALLS[node.target]


def _holds(reads: Reads) -> tuple[Callable[[nn.Module], bool], tuple[object, ...]]:
    """A function of the module, and what tells it apart from others.

    It is made from source, so that torch.compile sees plain attribute reads, which it guards.
    """
    values: dict[str, Any] = {}
    terms = []
    for (path, name), value in reads.attributes.items():
        attribute = ".".join(["self", *(_index(path)), name])
        if value is None or isinstance(value, bool):
            terms.append(f"{attribute} is {value}")
        else:
            values[f"v{len(values)}"] = value
            terms.append(f"{attribute} == v{len(values) - 1}")
    terms += [f"{_module(path)} is not None" for path in sorted(reads.modules)]
    for path, count in reads.children.items():
        terms.append(f"len({'.'.join(['self', *_index(path)])}._modules) == {count}")
    for path, (sequence, children) in reads.sequences.items():
        number = len(values)
        values |= {f"v{number}": sequence, f"v{number + 1}": children, "is_still": _is_still}
        terms.append(f"is_still({_module(path)}, v{number}, v{number + 1})")
    source = f"def holds(self):\n    return {' and '.join(terms) or 'True'}\n"
    return _define(source, "holds", values), (source, *values.values())


def _is_still(module: nn.Module | None, kind: type[nn.Module], children: tuple[str, ...]) -> bool:
    """Whether a sequence that was looked into is what it was."""
    return (
        module is not None
        and original_class(module) is kind
        and tuple(module._modules) == children
        and is_plain_sequence(module)
    )


def _module(path: str) -> str:
    """A module by its path; None where it is gone. `nn.Module.__getattr__` would take ten times as long."""
    parent, _, name = path.rpartition(".")
    return ".".join(["self", *_index(parent)]) + f"._modules.get({name!r})"


def _index(path: str) -> list[str]:
    """A path as attributes; children of lists have numbers for names."""
    return [f"_modules[{part!r}]" for part in path.split(".")] if path else []


def _rewrite(graph: fx.Graph, chains: list[Chain]) -> fx.Graph:
    """The graph with a block in place of each chain's end. Blocks hand their input on to its later readers."""
    ends = {chain.end: chain for chain in chains}
    inner = {node for chain in chains for node in chain.nodes if node is not chain.end}
    internal = {chain.end for chain in chains if _only_blocks_read(chain.end, chains)}
    order = [node for node in graph.nodes if node not in inner]
    last_reader = {arg: i for i, node in enumerate(order) for arg in _reads(node, ends)}
    new = fx.Graph()
    value: dict[fx.Node, fx.Node] = {}
    layouts = _Layouts(new, value, internal)
    for i, node in enumerate(order):
        chain = ends.get(node)
        if chain is None:
            value[node] = new.node_copy(node, lambda n: value[n])
            if node.op == "output":
                break
            continue
        shares = last_reader[chain.input] > i
        call = new.call_function(shared_block if shares else block, _arguments(new, chain, value, layouts.of(chain)))
        if shares:
            value[node] = new.call_function(operator.getitem, (call, 0))
            value[chain.input] = new.call_function(operator.getitem, (call, 1))
        else:
            value[node] = call
    return new


def _reads(node: fx.Node, ends: dict[fx.Node, Chain]) -> list[fx.Node]:
    chain = ends.get(node)
    if chain is None:
        return list(node.all_input_nodes)
    return [chain.input, *([chain.residual] if chain.residual is not None else [])]


def _only_blocks_read(end: fx.Node, chains: list[Chain]) -> bool:
    readers = {node for chain in chains for node in (chain.conv, chain.add) if node is not None}
    return bool(end.users) and all(user in readers for user in end.users)


class _Layouts:
    """Results that only blocks read lie as kernels like it; what leaves lies as it would without any block."""

    def __init__(self, graph: fx.Graph, value: dict[fx.Node, fx.Node], internal: set[fx.Node]) -> None:
        self.graph, self.value, self.internal = graph, value, internal
        self.outside: dict[fx.Node, fx.Node] = {}  # of a result that only blocks read: its layout without blocks

    def of(self, chain: Chain) -> fx.Node | None:
        head = chain.input
        if chain.end not in self.internal and head not in self.internal:
            return None
        conv = _child(self.graph, str(chain.conv.target))
        outside = self.graph.call_function(outer_layout, (self.outside.get(head, self.value[head]), conv))
        if chain.end not in self.internal:
            return outside
        self.outside[chain.end] = outside
        return self.graph.call_function(inner_layout, (self.value[head],))


def _child(graph: fx.Graph, path: str) -> fx.Node:
    """A module by its path, read from dictionaries as `_module` does."""
    first, *rest = path.split(".")
    found = graph.call_function(operator.getitem, (graph.get_attr("_modules"), first))
    for name in rest:
        found = graph.call_function(operator.getitem, (graph.call_function(getattr, (found, "_modules")), name))
    return found


def _arguments(new: fx.Graph, chain: Chain, value: dict[fx.Node, fx.Node], layout: fx.Node | None) -> tuple[Any, ...]:
    def module(node: fx.Node | None) -> Any:
        return None if node is None else _child(new, str(node.target))

    activation: Any = _activation(chain)
    if chain.activation is not None and chain.activation.op == "call_module":
        activation = module(chain.activation)
    residual = value[chain.residual] if chain.residual is not None else None
    return value[chain.input], module(chain.conv), module(chain.norm), activation, residual, chain.adds_in_place, layout


def _define(source: str, name: str, values: dict[str, Any], of: str = "") -> Any:
    """Executes a definition; tracebacks and debuggers find its text."""
    file = f"<freezekit.fuse {of or name} {next(_counter)}>"
    namespace = dict(values)
    exec(compile(source, file, "exec"), namespace)
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    return namespace[name]
