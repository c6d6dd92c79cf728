"""The model and the optimizers under audit, indexed once for every check."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from freezekit._inputs import Arguments
from freezekit.freezing.api import all_names


@dataclass(frozen=True)
class Subject:
    """What the checks look at.

    Attributes:
        model: the model, wrappers included.
        optimizers: every optimizer that steps it, maybe none.
        inputs: arguments of a forward pass, or None.
        schedule: a freezing schedule to hold against torch.compile's limit, or None.
    """

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    inputs: Arguments | None
    schedule: Any = None

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, each parameter once, under its first name."""
        return dict(self.model.named_parameters())

    @cached_property
    def names(self) -> dict[int, str]:
        """``id`` of a parameter -> its first name."""
        return {id(p): name for name, p in self.parameters.items()}

    @cached_property
    def all_names(self) -> dict[int, tuple[str, ...]]:
        """``id`` of a parameter -> every name it is reached by (more than one when weights are tied)."""
        return all_names(self.model)

    @cached_property
    def frozen(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, where ``requires_grad`` is False and a gradient would be possible."""
        return {n: p for n, p in self.parameters.items() if not p.requires_grad and can_train(p)}

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, where ``requires_grad`` is True."""
        return {n: p for n, p in self.parameters.items() if p.requires_grad}

    @cached_property
    def optimized(self) -> set[int]:
        """``id`` of every tensor in a group of an optimizer."""
        return {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}

    def members(self) -> Iterator[tuple[torch.optim.Optimizer, int, str, nn.Parameter]]:
        """Optimizer, index of the group, name and parameter, for each parameter of the model in each optimizer."""
        for optimizer in self.optimizers:
            for index, group in enumerate(optimizer.param_groups):
                for p in group["params"]:
                    if id(p) in self.names:
                        yield optimizer, index, self.names[id(p)], p

    def modules(self) -> Iterable[tuple[str, nn.Module]]:
        """Name -> module, each once; the root's name is written ``(root)``."""
        for name, module in self.model.named_modules():
            yield name or "(root)", module


def is_in_frozen_block(model: nn.Module, path: str) -> bool:
    """Whether the module at ``path`` is frozen, or, without parameters of its own, sits in a block that is.

    The block is the nearest module around it that has parameters; a module with parameters is its own.
    """
    while True:
        module = model.get_submodule(path)
        if path == "" or next(module.parameters(), None) is not None:
            return all_frozen(module)
        path = path.rpartition(".")[0]


def can_train(p: torch.Tensor) -> bool:
    """Whether autograd could give this tensor a gradient (integers never have one)."""
    return p.is_floating_point() or p.is_complex()


def all_frozen(module: nn.Module) -> bool:
    """Whether the module, with all inside it, has parameters and none of them is trainable."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
