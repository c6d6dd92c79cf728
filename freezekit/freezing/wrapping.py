"""Optimizers inside others: Lookahead, ZeroRedundancyOptimizer, the wrappers of accelerate, fastai and Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from types import MemberDescriptorType
from typing import Any

from torch.optim import Optimizer

from freezekit._arguments import shown


def inside(optimizer: Any) -> list[Optimizer]:
    """The optimizers that ``optimizer``, itself one or not, has as attributes, or in lists and dictionaries; each once.

    >>> import torch
    >>> class Wrapper:
    ...     def __init__(self, optimizer):
    ...         self.optimizer = optimizer
    >>> inside(Wrapper(torch.optim.SGD([torch.zeros(1)])))[0].__class__.__name__
    'SGD'
    """
    members = [pair for kind in type(optimizer).__mro__ for pair in vars(kind).items()]
    slots = [name for name, member in members if isinstance(member, MemberDescriptorType)]
    held = [*getattr(optimizer, "__dict__", {}).values(), *(getattr(optimizer, name, None) for name in slots)]
    for value in held[:]:
        held += dict.values(value) if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return list(
        {id(value): value for value in held if isinstance(value, Optimizer) and value is not optimizer}.values()
    )


def layers(optimizer: Any) -> Iterator[Any]:
    """``optimizer``, the one inside it, the one inside that, and so on, as long as there is exactly one."""
    met: list[Any] = []
    while not any(optimizer is one for one in met):
        met.append(optimizer)
        yield optimizer
        within = inside(optimizer)
        if len(within) != 1:
            return
        optimizer = within[0]


def optimizers_of(given: Any, *, to_change: bool) -> list[Optimizer]:
    """What steps the parameters that ``given`` is to step: itself, or what it wraps.

    Of optimizers inside each other it is the innermost that has all parameters; if its groups are to be changed, the
    innermost whose groups are those of ``given``, as those of a shard of ZeroRedundancyOptimizer are not. Of what is no
    optimizer and holds several, it is all of them.

    Raises:
        TypeError: there is none in ``given``.
    """
    every = list(layers(given))
    found = [one for one in every if isinstance(one, Optimizer)]
    if found:
        lists = [[group["params"] for group in one.param_groups] for one in found]
        held = [list(map(id, each)) if to_change else {id(p) for params in each for p in params} for each in lists]
        return [[one for one, ids in zip(found, held) if ids == held[0]][-1]]
    several = [one for within in inside(every[-1]) for one in optimizers_of(within, to_change=to_change)]
    if not several:
        cure = (
            ", and found none inside it: pass the one that it wraps, or none where it wraps none (what is frozen has "
            "no .grad, and optimizers pass over what has none)"
        )
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or several, got {_kind_of(given)}"
            f"{cure if hasattr(given, 'step') else ''}"
        )
    return several


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer whose step reads gradients and moves parameters.

    Raises:
        TypeError: there is none in ``optimizer``.
        ValueError: there are several.
    """
    *_, last = layers(optimizer)
    several = inside(last)
    if len(several) > 1:
        kinds = ", ".join(type(one).__name__ for one in several)
        raise ValueError(
            f"optimizer: {type(last).__name__} has several inside it ({kinds}); pass the one that is meant"
        )
    if not isinstance(last, Optimizer) or "_optimizer_step_pre_hooks" not in vars(last):
        # What is no optimizer, or a wrapper around one that cannot be seen, which never called Optimizer.__init__.
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {_kind_of(last)}, and found none inside it; "
            "pass the optimizer that it wraps (where it wraps none, it has no hooks by which its steps can be watched)"
        )
    return last


def _kind_of(value: Any) -> str:
    """What an error shows: a plain value, or a class with its module, since others name theirs Optimizer as well."""
    kind = type(value)
    plain = kind.__module__ == "builtins"
    return f"{kind.__name__} {shown(value)}" if plain else f"{kind.__module__}.{kind.__qualname__}"
