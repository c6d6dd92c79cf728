"""`module:factory`, as a model is named on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer


class FactoryError(Exception):
    """The factory could not be found, failed, or did not return what it should."""


def load(spec: str) -> Any:
    """The object that ``module:name`` names; ``name`` may have dots.

    Raises:
        FactoryError: no such module, no such name, or not callable.
    """
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise FactoryError(f"expected module:factory, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as e:
        raise FactoryError(f"cannot load {spec!r}: {e}") from e
    if not callable(found):
        raise FactoryError(f"{spec!r} is a {type(found).__name__}, not a callable")
    return found


class Made(NamedTuple):
    """What a factory made; `optimizer` and `inputs` are None where it made none."""

    model: nn.Module
    optimizer: Any = None
    inputs: Any = None


def build(spec: str) -> Made:
    """Call the factory, which returns a model, and an optimizer (or several), and inputs, or one of the two.

    Raises:
        FactoryError: the factory cannot be loaded, raises, or returns something else.
    """
    factory = load(spec)
    try:
        made = factory()
    except Exception as e:
        raise FactoryError(f"{spec} raised {type(e).__name__}: {e}") from e
    made = made if isinstance(made, tuple) else (made,)
    if 1 <= len(made) <= 3 and isinstance(made[0], nn.Module):
        if len(made) == 2 and not _is_optimizer(made[1]):
            return Made(made[0], None, made[1])
        if len(made) < 3 or made[1] is None or _is_optimizer(made[1]):
            return Made(*made)
    kinds = ", ".join(type(m).__name__ for m in made)
    raise FactoryError(
        f"{spec} must return model, (model, optimizer), (model, inputs) or (model, optimizer, inputs), got ({kinds})"
    )


def _is_optimizer(made: Any) -> bool:
    several = made if isinstance(made, (list, tuple)) else (made,)
    return len(several) > 0 and all(isinstance(one, Optimizer) for one in several)
