"""Optimizers inside optimizers: Lookahead, ZeroRedundancyOptimizer, the wrappers of accelerate and Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer


def inside(optimizer: Any) -> list[Optimizer]:
    """The optimizers that are attributes of ``optimizer``, itself an optimizer or not; each once.

    >>> import torch
    >>> class Wrapper:
    ...     def __init__(self, optimizer):
    ...         self.optimizer = optimizer
    >>> inside(Wrapper(torch.optim.SGD([torch.zeros(1)])))[0].__class__.__name__
    'SGD'
    """
    held = (value for value in getattr(optimizer, "__dict__", {}).values() if isinstance(value, Optimizer))
    return list({id(value): value for value in held if value is not optimizer}.values())


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
        # What is not an optimizer, or a wrapper around one that cannot be seen, which never called Optimizer.__init__.
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(last).__name__}, and found none inside it; "
            "pass the optimizer that it wraps"
        )
    return last
