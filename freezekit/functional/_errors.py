"""Errors of functions that stand in for torch's: the ones that torch's own give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from freezekit import backends

Function = TypeVar("Function", bound=Callable[..., Any])


def as_torch(torch_s: Callable[..., Any]) -> Callable[[Function], Function]:
    """Decorates a stand-in for `torch_s`: where it fails, torch's own is called with the same arguments, and fails.

    So a wrong argument gives torch's exception, and calls that are right pay for no check. Where torch's would run,
    and under a backend that was demanded, the stand-in's own error is the one to know.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as ours:
                if backends._current not in ("auto", "aten") or torch.compiler.is_compiling():
                    raise
                try:
                    torch_s(*args, **kwargs)
                except Exception as error:
                    raise error from None
                raise ours from None

        return cast(Function, checked)

    return decorate
