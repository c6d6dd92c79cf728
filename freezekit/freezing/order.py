"""Which parameters come before a given layer: in registration order, or in the order of one traced forward.

Registration order is the order of ``model.named_modules()``, the order in which ``__init__`` assigned the layers. It is
what a reader of the model's repr sees, needs no data, and is the forward order of most models; where it is not, one
forward with ``inputs`` gives the true order of calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from freezekit._inputs import Arguments, arguments
from freezekit._twin import Twin, on_twin
from freezekit.freezing.norm import has_statistics


def before(model: nn.Module, until: str, inputs: Any = None) -> tuple[set[int], set[int]]:
    """Ids of the parameters and norm layers before ``until``, which itself stays out (as a range's stop does).

    Args:
        until: the name of a module or parameter of ``model``.
        inputs: None for registration order; else the arguments of one forward: a tensor, a tuple or list of positional
            arguments, or a mapping of keyword arguments.
    """
    if inputs is None:
        return _registered_before(model, until)
    return _called_before(model, until, inputs)


def _registered_before(model: nn.Module, until: str) -> tuple[set[int], set[int]]:
    params: set[int] = set()
    norms: set[int] = set()
    for module_name, module in model.named_modules(remove_duplicate=False):
        if module_name == until:
            # One that is shared with an earlier layer is not before ``until``.
            return params - {id(p) for p in module.parameters()}, norms
        for name, param in module._parameters.items():
            if f"{module_name}.{name}".lstrip(".") == until:
                return params - {id(param)}, norms
            if param is not None:
                params.add(id(param))
        if has_statistics(module):
            norms.add(id(module))
    raise AssertionError(f"{until} is a name of the model and was not met")


def _called_before(model: nn.Module, until: str, inputs: Any) -> tuple[set[int], set[int]]:
    first_call = _trace(model, arguments(inputs))
    names = dict(model.named_modules(remove_duplicate=False))
    owner_name = until if until in names else until.rpartition(".")[0]
    stop = _position(names, owner_name, first_call)
    if stop is None:
        raise ValueError(f"until: {until!r} was not called in the forward with these inputs; name a layer that is")
    stays = {id(p) for p in names[owner_name].parameters()}
    params: set[int] = set()
    norms: set[int] = set()
    for name, module in names.items():
        position = _position(names, name, first_call, descend=False)
        if position is None or position >= stop:
            continue
        params |= {id(p) for p in module._parameters.values() if p is not None}
        if has_statistics(module):
            norms.add(id(module))
    return params - stays, norms


def _position(names: dict[str, nn.Module], name: str, first_call: dict[int, int], descend: bool = True) -> int | None:
    """When the module ``name`` was first called: itself, else (a list, say) its first called descendant, else the
    nearest ancestor that was called and called no layer inside it (it used the parameters directly, as
    MultiheadAttention does with ``out_proj``). None when the forward did not use it: unused is not "before".
    """
    module = names[name]
    if id(module) in first_call:
        return first_call[id(module)]
    if descend:
        inner = _calls_inside(module, first_call)
        if inner:
            return min(inner)
    while name:
        name = name.rpartition(".")[0]
        if id(names[name]) in first_call:
            inside = _calls_inside(names[name], first_call)
            return None if len(inside) > 1 else inside[0]
    return None


def _calls_inside(module: nn.Module, first_call: dict[int, int]) -> list[int]:
    return [first_call[id(m)] for m in module.modules() if id(m) in first_call]


def _trace(model: nn.Module, inputs: Arguments) -> dict[int, int]:
    """Run one forward of a copy, in eval mode and without gradients, and number the modules by their first call."""

    def run(twin: Twin) -> dict[str, int]:
        first_call: dict[str, int] = {}
        names = {id(module): name for name, module in twin.named_modules()}

        def note(module: nn.Module, args: Any) -> None:
            first_call.setdefault(names[id(module)], len(first_call))

        for _, module in twin.named_modules():
            module.register_forward_pre_hook(note)
            module.training = False  # not by train(), which a module may hold or override
        with twin.undisturbed(), torch.no_grad():
            twin.run()
        return first_call

    return {id(model.get_submodule(name)): position for name, position in on_twin(model, inputs, run).items()}
