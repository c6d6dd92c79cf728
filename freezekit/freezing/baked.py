"""Norms whose train mode is a constant of a graph, which neither ``train()`` nor a held layer changes.

`torch.jit.trace`, `torch.export` and `torch.fx` record one call. What was recorded in train mode reads the batch and
moves the running statistics for good: they cannot be held.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

# Of each, the places of the running mean and of the flag that says to read the batch, and the flag's name.
_TORCHSCRIPT = {"aten::batch_norm": (3, 5), "aten::instance_norm": (3, 5), "aten::native_batch_norm": (3, 5)}
_ATEN = torch.ops.aten
_CALLS: dict[Any, tuple[int, int, str]] = {
    _ATEN.batch_norm.default: (3, 5, "training"),
    _ATEN.instance_norm.default: (3, 5, "use_input_stats"),
    _ATEN.native_batch_norm.default: (3, 5, "training"),
    _ATEN._native_batch_norm_legit.default: (3, 5, "training"),
    _ATEN._native_batch_norm_legit_functional.default: (3, 5, "training"),
    F.batch_norm: (1, 5, "training"),
    F.instance_norm: (1, 5, "use_input_stats"),
    torch.batch_norm: (3, 5, "training"),
    torch.instance_norm: (3, 5, "use_input_stats"),
}


def in_train_mode(model: nn.Module) -> list[str]:
    """Names of the modules of ``model`` whose running statistics a graph in it moves, whatever their mode."""
    found: dict[str, None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        means: Iterable[str] = ()
        if isinstance(module, torch.jit.ScriptModule):
            means = _in_torchscript(module)
        elif isinstance(module, fx.GraphModule):
            means = _in_graph(module.graph)
        for mean in means:
            owner = mean.rpartition(".")[0]
            found[".".join(part for part in (path, owner) if part)] = None
    return list(found)


def check_can_hold(model: nn.Module, norms: Iterable[str], modules: Iterable[nn.Module]) -> None:
    """Refuse to hold the layers of these names where a graph says otherwise.

    Args:
        modules: those of ``model``.

    Raises:
        ValueError: there is one.
    """
    if not any(isinstance(module, torch.jit.ScriptModule | fx.GraphModule) for module in modules):
        return
    named = dict(model.named_modules(remove_duplicate=False))
    asked = {id(named[name]): name for name in norms}
    for name in (asked[id(named[name])] for name in in_train_mode(model) if id(named.get(name)) in asked):
        raise ValueError(
            f"model: the running statistics of {name or 'the model'!r} cannot be frozen: its train mode is a constant "
            "of the graph that was traced or exported;\n"
            'freeze before the model is traced, or trace it in eval mode, or pass norm="batch" to let them move'
        )


def _in_graph(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _CALLS:
            continue
        at, flag_at, flag = _CALLS[node.target]
        mean = node.args[at] if len(node.args) > at else node.kwargs.get("running_mean")
        trains = node.args[flag_at] if len(node.args) > flag_at else node.kwargs.get(flag, flag == "use_input_stats")
        if trains is True and isinstance(mean, fx.Node) and mean.op == "get_attr":
            yield str(mean.target)


def _in_torchscript(module: torch.jit.ScriptModule) -> Iterator[str]:
    if not hasattr(module, "inlined_graph"):  # it has no forward
        return
    graph: Any = module.inlined_graph
    for kind, (at, flag_at) in _TORCHSCRIPT.items():
        for node in graph.findAllNodes(kind):
            inputs = list(node.inputs())
            mean, trains = inputs[at], inputs[flag_at].node()
            constant = trains.kind() == "prim::Constant" and inputs[flag_at].toIValue() is True
            if constant and (name := _attribute(mean)):
                yield name


def _attribute(value: Any) -> str:
    """The dotted name by which a graph of TorchScript gets ``value`` from the module that it is of."""
    parts = []
    while (node := value.node()).kind() == "prim::GetAttr":
        parts.append(node.s("name"))
        value = next(iter(node.inputs()))
    return ".".join(reversed(parts))
