"""How the arguments of a forward pass are handed over: one rule for every function that takes `inputs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Arguments", "arguments"]


class Arguments(NamedTuple):
    """Positional and keyword arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self, function: Callable[..., Any]) -> Any:
        """Calls a function, or a module, with them."""
        return function(*self.args, **self.kwargs)


def arguments(inputs: Any) -> Arguments:
    """The arguments that `inputs` stands for.

    Args:
        inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Raises:
        TypeError: for anything else, and for a mapping whose keys are not names.

    >>> arguments((1, "same"))
    Arguments(args=(1, 'same'), kwargs={})
    >>> arguments({"x": 1}).call(lambda x: x + 1)
    2
    """
    if isinstance(inputs, Tensor):
        return Arguments((inputs,), {})
    if isinstance(inputs, (tuple, list)):
        return Arguments(tuple(inputs), {})
    if isinstance(inputs, Mapping):
        for key in inputs:
            if not isinstance(key, str):
                raise TypeError(f"inputs: a mapping holds keyword arguments by name, got the key {key!r}")
        return Arguments((), dict(inputs))
    raise TypeError(
        "inputs must be a tensor, a tuple or list of positional arguments or a mapping of keyword arguments, "
        f"got {type(inputs).__name__}; put a single argument of another type in a tuple"
    )
