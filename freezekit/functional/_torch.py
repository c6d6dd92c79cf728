"""What functions that stand in for torch's leave to torch's own: calls that keep nothing, and errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from freezekit import backends

Function = TypeVar("Function", bound=Callable[..., Any])


def as_torch(torch_s: Callable[..., Any], *, shortcut: bool = True) -> Callable[[Function], Function]:
    """Decorates a stand-in for `torch_s`, a function of the same arguments, of which the first is the input.

    Where no gradient is needed nothing is kept, and torch's own function is the shortest way; without `shortcut` the
    stand-in runs there too, for what it refuses and torch would take. Where the stand-in fails,
    torch's own is called with the same arguments, and fails: a wrong argument gives torch's exception, and calls that
    are right pay for no check. Under a backend that was demanded, the stand-in runs, and its own error is the one to
    know.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            # Subclasses and fx's proxies are to see the stand-in, and a trace is to be one with gradients and without.
            free = backends._current == "auto" or backends._current == "aten"
            plain = shortcut and free and args and type(args[0]) is Tensor
            if plain and not _learns(args) and not (kwargs and _learns(kwargs.values())) and _tracing() is None:
                return torch_s(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except Exception as ours:
                if not free or torch.compiler.is_compiling():
                    raise
                try:
                    torch_s(*args, **kwargs)
                except Exception as error:
                    raise error from None
                raise ours from None

        return cast(Function, checked)

    return decorate


_tracing = torch._C._get_tracing_state  # a name that torch.compile knows


def _learns(arguments: Iterable[Any]) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.requires_grad:
            return torch.is_grad_enabled()
    return False
