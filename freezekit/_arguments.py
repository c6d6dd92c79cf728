"""Checks of arguments by torch's rules, with errors that name the argument."""

import operator
import reprlib
from collections.abc import Sequence
from numbers import Real
from types import FunctionType, MethodType

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Size2 = int | Sequence[int]

_SMALL = 2**31


def shown(value: object) -> str:
    """What an error shows of a value: one line of it, and of what holds others, such as a tensor or a module, its kind.

    >>> shown([torch.zeros(100), nn.Linear(1, 1), "same"])
    "[a Tensor of shape (100,), Linear(...), 'same']"
    >>> shown(nn.Linear(1, 2).state_dict())
    "{'bias': a Tensor of shape (2,), 'weight': a Tensor of shape (2, 1)}"
    """
    return " ".join(_Line().repr(value).split())


def brief(names: Sequence[str]) -> str:
    """The first name, and how many more there are.

    >>> brief(["a", "b", "c"])
    'a and 2 more'
    """
    if not names:
        return "-"
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


class _Line(reprlib.Repr):
    def repr1(self, x: object, level: int) -> str:
        if isinstance(x, torch.Tensor):
            number = type(x) is torch.Tensor and x.numel() == 1
            shape = "no shape yet" if is_lazy(x) else f"shape {tuple(x.shape)}"
            return repr(x) if number else f"a {type(x).__name__} of {shape}"
        if isinstance(x, nn.Module | torch.optim.Optimizer):
            return f"{type(x).__name__}(...)"
        if isinstance(x, FunctionType | MethodType):
            return f"<{type(x).__name__} {x.__qualname__}>"
        if isinstance(x, dict):  # subclasses too, such as a state_dict's, which reprlib would write out
            return self.repr_dict(x, level)
        if isinstance(x, tuple):
            return self.repr_tuple(x, level)
        return super().repr1(x, level)


def check_module(value: object, name: str = "model") -> None:
    """Raises TypeError unless `value` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_choice(name: str, value: object, *choices: str) -> None:
    """Raises ValueError unless `value` is one of two or more strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(f'{chr(34)}{c}{chr(34)}' for c in choices)}, got {shown(value)}")


def check_real(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a real number, which a bool is not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {shown(value)}")


def check_count(name: str, value: object) -> None:
    """Raises TypeError or ValueError unless `value` is an integer of at least 1."""
    count = _integer(value)
    if count is None:
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


def plain(stride: object, padding: object, dilation: object, groups: object) -> bool:
    """Whether all are ints or pairs of ints, as a module's own settings are, so that nothing needs to be converted."""
    return type(groups) is int and groups < _SMALL and _plain(stride) and _plain(padding) and _plain(dilation)


def _plain(value: object) -> bool:
    if type(value) is tuple:
        return len(value) == 2 and type(value[0]) is int and type(value[1]) is int
    return type(value) is int and value < _SMALL


def numbers(name: str, value: object) -> int | list[int]:
    """`value` as the operators take it: one integer, or a list or tuple of them.

    Integer tensors of one element and numpy integers are taken for integers, as torch takes them; a bool is not.

    Raises:
        TypeError: if it is anything else.
        ValueError: if it is one integer of more than 64 bits.

    >>> numbers("stride", (1, 2))
    [1, 2]
    >>> numbers("stride", 1.5)
    Traceback (most recent call last):
    TypeError: stride must be an integer or a list of them, got 1.5
    """
    if isinstance(value, list | tuple):
        return [_number(name, element, value, TypeError) for element in value]
    return _number(name, value, value, ValueError)


def number(name: str, value: object) -> int:
    """`value` as an integer.

    Raises:
        TypeError, ValueError: as :func:`numbers`.
    """
    if isinstance(value, list | tuple):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    return _number(name, value, value, ValueError)


def _integer(value: object) -> int | None:
    """None for what is no integer, which a bool is not."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _number(name: str, value: object, whole: object, overflow: type[Exception]) -> int:
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    result = _integer(value)
    if result is None:
        raise TypeError(f"{name} must be an integer or a list of them, got {shown(whole)}")
    if not -(2**63) <= result < 2**63:
        raise overflow(f"{name} must fit into 64 bits, got {whole!r}")
    return result
