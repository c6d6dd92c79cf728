"""What a forward knows by names outside of its model, and no copy of the model holds: put back as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

CONTAINERS = (dict, list, set)  # which a run may write to


def names_of(function: FunctionType) -> dict[str, Any]:
    """What the names of a function refer to, outside of it, and its defaults."""
    code, known = function.__code__, function.__globals__
    found = {name: known[name] for name in code.co_names if name in known}
    cells = zip(code.co_freevars, function.__closure__ or ())
    found.update((name, cell.cell_contents) for name, cell in cells if is_filled(cell))
    last_first = zip(code.co_varnames[: code.co_argcount][::-1], (function.__defaults__ or ())[::-1])
    return {**found, **dict(last_first), **(function.__kwdefaults__ or {})}


def modules_in(value: object) -> dict[str, nn.Module]:
    """A module, by the name "", or those that a list, a dictionary or an object of any class holds, by theirs.

    >>> list(modules_in({"vae": nn.Linear(2, 2), "size": 8})), list(modules_in(nn.ReLU()))
    (['vae'], [''])
    """
    if isinstance(value, nn.Module):
        return {"": value}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, type | FunctionType | ModuleType):
        return {}
    held = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    pairs = list(held.items()) if isinstance(held, dict) else []
    return {str(name): part for name, part in pairs if isinstance(part, nn.Module)}


def is_filled(cell: CellType) -> bool:
    """Whether a variable of a closure has a value.

    >>> is_filled(CellType()), is_filled(CellType(1))
    (False, True)
    """
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def strangers_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that methods of these know by a global name or a closure, and that are not among them."""
    own = set(modules)
    kinds = {base for module in own for base in type(module).__mro__ if not base.__module__.startswith("torch.")}
    methods = (value for kind in kinds for value in vars(kind).values() if isinstance(value, FunctionType))
    named = {value for method in methods for value in names_of(method).values() if isinstance(value, nn.Module)}
    return list({part for module in named for part in module.modules()} - own)


@contextmanager
def kept(modules: Iterable[nn.Module], containers: Iterable[Any]) -> Iterator[None]:
    """Afterwards attributes and buffers of these modules, not of what is in them, and the containers are as before."""
    attributes = [vars(module) for module in modules]
    inner = [value for held in attributes for value in held.values() if isinstance(value, CONTAINERS)]
    contents = [(container, copy.copy(container)) for container in (*attributes, *inner, *containers)]
    tensors = [t for m in modules for t in m.buffers(recurse=False) if t.layout is torch.strided and not t.is_meta]
    buffers = [(t, t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        for container, content in contents:
            if _identities(container) != _identities(content):
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _identities(container: Any) -> list[Any]:
    return [(k, id(v)) for k, v in container.items()] if isinstance(container, dict) else [id(v) for v in container]
