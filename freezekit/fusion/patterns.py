"""Finds Conv -> BatchNorm -> (+ residual) -> ReLU in the dataflow of a forward."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from freezekit.fusion.layers import ACTIVATION_CALLS, ACTIVATIONS, CONVS, NORMS

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ADDS_IN_PLACE = {operator.iadd, "add_"}
_FRESH = {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.mul, torch.cat, torch.relu}


@dataclass(frozen=True)
class Chain:
    """Nodes of one block, in order; `residual` is the other operand of `add`."""

    conv: fx.Node
    norm: fx.Node | None = None
    add: fx.Node | None = None
    residual: fx.Node | None = None
    activation: fx.Node | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        return [n for n in (self.conv, self.norm, self.add, self.activation) if n is not None]

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def input(self) -> fx.Node:
        node = self.conv.args[0]
        assert isinstance(node, fx.Node)
        return node

    @property
    def adds_in_place(self) -> bool:
        return self.add is not None and self.add.target in _ADDS_IN_PLACE


def find_chains(root: nn.Module, graph: fx.Graph) -> list[Chain]:
    """Every convolution of the graph with the layers behind it that nobody reads between; in order of their ends."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    claimed: set[fx.Node] = set()
    chains = []
    # The last one first: of two convolutions whose results are added, the later one can take the sum.
    for node in reversed(graph.nodes):
        if _leaf(root, node, CONVS):
            chain = _safe(root, _grow(root, node, claimed), place)
            claimed.update(chain.nodes)
            chains.append(chain)
    return sorted(chains, key=lambda chain: place[chain.end])


def _leaf(root: nn.Module, node: fx.Node, kinds: Iterable[type[nn.Module]]) -> bool:
    """Whether a node calls a layer of these kinds on one value and nothing else."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    return type(root.get_submodule(str(node.target))) in kinds


def _grow(root: nn.Module, conv: fx.Node, claimed: set[fx.Node]) -> Chain:
    parts: dict[str, fx.Node] = {}
    last = conv
    while len(last.users) == 1 and "activation" not in parts:
        user = next(iter(last.users))
        if user in claimed or user.all_input_nodes.count(last) != 1:
            break
        if not parts and _leaf(root, user, NORMS):
            parts["norm"] = user
        elif "add" not in parts and (other := _other_operand(user, last)) is not None:
            parts["add"], parts["residual"] = user, other
        elif _is_activation(root, user):
            parts["activation"] = user
        else:
            break
        last = user
    return Chain(conv, **parts)


def _other_operand(node: fx.Node, mine: fx.Node) -> fx.Node | None:
    """What is added to `mine` by this node; None if it adds no tensor, adds it scaled, or adds into the other one."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDS or node.kwargs:
        return None
    if len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    first, second = node.args
    if first is second or (node.target in _ADDS_IN_PLACE and first is not mine):
        return None
    other = second if first is mine else first
    assert isinstance(other, fx.Node)
    return other


def _is_activation(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _leaf(root, node, ACTIVATIONS)
    if node.op not in ("call_function", "call_method") or node.target not in ACTIVATION_CALLS or len(node.args) != 1:
        return False
    return set(node.kwargs) <= {"inplace"} and isinstance(node.kwargs.get("inplace", False), bool)


def _safe(root: nn.Module, chain: Chain, place: dict[fx.Node, int]) -> Chain:
    """The longest beginning of a chain that may run at its end.

    A block runs where its last layer stood. Nothing in between may write to what the block reads: a child module or an
    in-place function that was given the same storage.
    """
    nodes = chain.nodes
    while len(nodes) > 1:
        late = _written_between(root, chain.input, nodes[0], nodes, place)
        if chain.residual is not None and chain.add is not None:
            late = late or _written_between(root, chain.residual, chain.add, nodes, place)
        if not late:
            break
        nodes = nodes[:-1]
        keep = set(nodes)
        chain = Chain(
            chain.conv,
            chain.norm if chain.norm in keep else None,
            chain.add if chain.add in keep else None,
            chain.residual if chain.add in keep else None,
        )
    return chain


def _written_between(
    root: nn.Module, value: fx.Node, first: fx.Node, nodes: list[fx.Node], place: dict[fx.Node, int]
) -> bool:
    """Whether a node behind `first` and before the chain's end may write to the storage of `value`."""
    read = _storages(root, value)
    between = [n for n in place if place[first] < place[n] < place[nodes[-1]] and n not in nodes]
    writers = [n for n in between if _may_write(root, n)]
    return any(read & _storages(root, arg) for n in writers for arg in n.all_input_nodes)


def _in_place(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = (name.endswith("_") and not name.endswith("__")) or name in ("setitem", "__setitem__")
    return writes or node.target in _IN_PLACE_OPERATORS or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


_IN_PLACE_OPERATORS = {
    getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior")
}


def _may_write(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node may write to its arguments; of a child module that is no known layer, that is not known."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    if node.op == "call_module" and type(root.get_submodule(str(node.target))) not in {*CONVS, *NORMS, *ACTIVATIONS}:
        return True
    return _in_place(root, node)


def _storages(root: nn.Module, node: fx.Node) -> set[Any]:
    """Names for the storages that a value may lie in. What comes from outside may be anything that came from there."""
    found: set[Any] = set()
    stack = [node]
    seen = set(stack)
    while stack:
        one = stack.pop()
        if one.op in ("placeholder", "get_attr"):
            found.add("outside")
            continue
        found.add(one)
        fresh = one.target in _FRESH or _leaf(root, one, [*CONVS, *NORMS])
        if fresh or (_is_activation(root, one) and not _in_place(root, one)):
            continue
        for arg in one.all_input_nodes:
            if arg not in seen:
                seen.add(arg)
                stack.append(arg)
    return found
