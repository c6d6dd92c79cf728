"""Finds the modules that a callable runs, which a twin copies."""

from collections.abc import Callable
from functools import partial
from inspect import signature, unwrap
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from freezekit._inputs import Arguments, tensors_in
from freezekit._twin.surroundings import modules_in, modules_within, names_of


def roots_of(function: Any) -> dict[str, nn.Module]:
    """The modules that a callable runs, by the names it has for them; see `Twin`.

    Raises:
        TypeError: there are none.
        ValueError: a lazy parameter of theirs has no shape yet.

    >>> vae = nn.Sequential(nn.Linear(2, 2))
    >>> list(roots_of(lambda x: vae(x).sin())), list(roots_of(vae.forward))
    (['vae'], [''])
    """
    found = _modules_of(function)
    if any(is_lazy(t) for root in found.values() for t in (*root.parameters(), *root.buffers())):
        raise ValueError("model has lazy parameters, whose shapes are not known before a first forward pass")
    return found


def _modules_of(function: Any) -> dict[str, nn.Module]:
    given: dict[str, Any] = {}
    while isinstance(function, partial):
        given.update(zip(_parameters(function.func), function.args))
        given.update(function.keywords)
        function = function.func
    owner = function.__self__ if isinstance(function, MethodType) else function
    if isinstance(owner, nn.Module):
        return {"": owner}
    owner = unwrap(owner) if callable(owner) else owner
    known = names_of(owner) if isinstance(owner, FunctionType) else dict(getattr(owner, "__dict__", {}))
    if isinstance(function, MethodType) and isinstance(function.__func__, FunctionType):
        known = {**names_of(function.__func__), **known}
    found = {
        ".".join(filter(None, (name, inner))): module
        for name, value in {**known, **given}.items()
        for inner, module in modules_in(value).items()
    }
    found = {**modules_within(owner, function), **found}
    if not (found and callable(function)):
        got = " ".join((type(function).__name__, getattr(function, "__qualname__", ""))).rstrip()
        cure = (
            ", which names no module, nor an object, list or dictionary with one right in it. Let a function name it: "
            "module = pipe.parts['unet']; explain(lambda x: module(x), x)"
        )
        raise TypeError(
            "model must be an nn.Module, or a callable that runs one, such as model.decode, got "
            f"{got}{cure if callable(function) else ''}"
        )
    return found


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Names of a callable's parameters, where it has a signature."""
    try:
        return list(signature(function).parameters)
    except (TypeError, ValueError):
        return []


def has_data(roots: dict[str, nn.Module], inputs: Arguments) -> bool:
    """Whether no tensor of the modules and inputs is on the meta device."""
    tensors = [t for root in roots.values() for t in (*root.parameters(), *root.buffers())]
    return not any(isinstance(t, Tensor) and t.is_meta for t in (*tensors, *tensors_in(tuple(inputs))))
