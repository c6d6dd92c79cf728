"""A plain account of what guard must tell and undo. It compares values, and knows neither checksums nor versions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from freezekit.freezing import is_held
from freezekit.guarding import Allowance


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


@dataclass(eq=False)
class Entry:
    """A frozen tensor, its value when guard met it, and where it had this value."""

    name: str
    tensor: torch.Tensor
    norm: nn.Module | None
    value: torch.Tensor
    memory: int

    def thawed(self) -> bool:
        return self.tensor.requires_grad if self.norm is None else not is_held(self.norm)


def frozen_now(model: nn.Module) -> dict[int, Entry]:
    found = [(name, param, None) for name, param in model.named_parameters() if not param.requires_grad]
    for path, module in model.named_modules():
        if is_held(module):
            found += [(f"{path}.{name}", buffer, module) for name, buffer in module.named_buffers()]
    return {id(t): Entry(name, t, norm, t.detach().clone(), t.data_ptr()) for name, t, norm in found}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@dataclass
class Account:
    """``allowed``: each lasting allowance, its layer's name, and the tensors that it has met."""

    model: nn.Module
    held: dict[int, Entry] = field(default_factory=dict)
    allowed: list[tuple[Allowance, str, list[torch.Tensor]]] = field(default_factory=list)

    def hear(self, unfrozen: Iterable[nn.Parameter] = ()) -> dict[int, Entry]:
        """Forget what was thawed or is allowed, and what ``unfrozen`` took the place of. Returns what is to be held."""
        inside = dict(self.model.named_children())
        here = [id(tensor) for tensor in tensors_of(self.model)]
        for _, name, met in self.allowed:
            met += tensors_of(inside[name]) if name in inside else []
            met[:] = [tensor for tensor in met if id(tensor) in here]
        free = {id(tensor) for *_, met in self.allowed for tensor in met}
        self.held = {key: one for key, one in self.held.items() if key not in free}
        frozen = {key: one for key, one in frozen_now(self.model).items() if key not in free}
        ids = set(map(id, unfrozen))
        names = {name for name, param in self.model.named_parameters() if id(param) in ids}
        for key, one in tuple(self.held.items()):
            if key in frozen:
                one.name, one.norm = frozen[key].name, frozen[key].norm
            elif one.thawed() or one.name in names:
                del self.held[key]
        return frozen

    def refresh(self) -> dict[int, Entry]:
        """Hold from now on what is newly frozen. Returns what is to be held."""
        frozen = self.hear()
        named = {one.name: self.held.get(key, one).value for key, one in frozen.items()}
        for key, one in tuple(self.held.items()):
            if key not in frozen and one.name in named and same(named[one.name], one.value):
                del self.held[key]
        self.held = {**frozen, **self.held}
        return frozen

    def look(self) -> tuple[list[Entry], list[Entry]]:
        """What moved and what left."""
        frozen = self.refresh()
        left = [one for key, one in self.held.items() if key not in frozen]
        moved = [one for key, one in self.held.items() if key in frozen and not same(one.tensor, one.value)]
        for one in self.held.values():
            one.memory = one.memory if one in moved else one.tensor.data_ptr()
        return moved, left

    def accept(self) -> None:
        self.held = {}
        self.refresh()
