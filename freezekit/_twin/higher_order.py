"""Operators that take functions, as torch.cond does, within a mode."""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class CannotWatch(NotImplementedError):
    """What a model calls computes something else where a mode watches."""


def is_higher_order(func: Any) -> bool:
    """Whether an operator takes functions."""
    return isinstance(func, HigherOrderOperator)


class Refusing(TorchFunctionMode):
    """Refuses operators that take functions where gradients are recorded.

    Torch compiles those functions, to find the parameters that they name. Within a mode of operators it does not, and
    such parameters get no gradient.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_higher_order(func) and torch.is_grad_enabled():
            raise CannotWatch(
                f"torch's {func.name()} loses gradients where it is watched. Write its choice or its loop in Python, "
                "or give what runs before and behind it alone"
            )
        return func(*args, **(kwargs or {}))


def call_higher_order(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any, *, has_data: bool) -> Any:
    """Calls an operator that takes functions, and has ``mode`` see what these call.

    Raises:
        NotImplementedError: without data it is not known what the functions do.
    """
    if not has_data:
        raise NotImplementedError(f"torch's {func.name()} runs functions that may depend on values")

    def seen(value: Any) -> Any:
        return _within(mode, value) if callable(value) and not isinstance(value, torch.Tensor) else value

    return func(*tree_map(seen, args), **tree_map(seen, kwargs))


def _within(mode: TorchDispatchMode, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with mode:
            return function(*args)

    return run
