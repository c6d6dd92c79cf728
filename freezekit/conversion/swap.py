"""`convert` and `revert`: which layer becomes which, by reassigning the class of the same object."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from freezekit import nn as layers
from freezekit._arguments import check_module, shown
from freezekit.freezing.index import Index
from freezekit.freezing.patterns import PatternError, flat, named_modules
from freezekit.fusion.classes import plan_of, unfuse_module
from freezekit.fusion.identity import classes_read

Model = TypeVar("Model", bound=nn.Module)
# What a layer of torch.nn computes is written in these, and freezekit's layers stand for that.
_METHODS = ("forward", "_conv_forward", "_apply_instance_norm")
Only = str | type[nn.Module] | nn.Module | Iterable[str | type[nn.Module] | nn.Module]


def _replaced(kind: type[nn.Module]) -> type[nn.Module]:
    """The public class of torch.nn that a layer of freezekit.nn is made from."""
    return next(b for b in kind.__mro__ if b.__module__.startswith("torch.nn.modules") and b.__name__[0] != "_")


SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    _replaced(kind): kind for kind in (getattr(layers, name) for name in layers.__all__)
}


def convert(model: Model, *, only: Only | None = None) -> Model:
    """Makes the layers of `model` freezekit's, in place.

    Convolutions, transposed convolutions, batch, instance, layer and group norm, ReLU, ReLU6, LeakyReLU, PReLU,
    Hardtanh, SiLU, GELU, Hardswish, Mish, Dropout, max pools, average pools, reflection and replication pads (see
    `freezekit.nn`) keep what they are: parameters, buffers, hooks, names, parametrizations, shared modules and
    attributes stay the same objects, only the class changes. Subclasses of users, and modules with a `forward` or
    `_conv_forward` of their own, are left alone, and so are layers within a module whose forward asks for exact classes
    (``type(layer) is nn.ReLU``) and those whose class in torch.nn was given another forward; `conversion_report` lists
    them. A forward that torch's class is given later is not seen.

    Args:
        model: any module; a single layer too.
        only: what to convert, instead of everything, in the words of `freeze`: a module's name, a glob over dotted
            names (``"layer1.*"``; ``*`` crosses dots), a class (``nn.ReLU``), a module of the model, or several of
            these. A module stands for all it contains.

    Returns:
        The same object.

    Raises:
        TypeError: if `model` is not an nn.Module, or `only` holds something else.
        PatternError: (a ValueError) if a part of `only` matches no layer that freezekit has; with similar names.

    >>> from torch import nn
    >>> import freezekit as fk
    >>> fk.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), only=nn.Conv2d)
    Sequential(
      (0): FreezableConv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
      (1): ReLU()
    )
    """
    modules = _selected(model, only)
    looked_at = classes_read(model)
    for module in modules:
        base = stock_base(module)
        if base is None or isinstance(module, SWAPS[base]) or id(module) in looked_at or reason_to_leave(module, base):
            continue
        _become(module, SWAPS[base])
    return model


def revert(model: Model, *, only: Only | None = None) -> Model:
    """Makes freezekit's layers of `model` those of `torch.nn` again, in place: the opposite of `convert` and of `fuse`.

    Args:
        model, only: as for `convert`; `only` may also name modules that `fuse` rewrote.

    Returns:
        The same object.

    Raises:
        TypeError, PatternError: as `convert`.

    >>> from torch import nn
    >>> import freezekit as fk
    >>> type(fk.revert(fk.convert(nn.ReLU()))) is nn.ReLU
    True
    """
    for module in _selected(model, only):
        unfuse_module(module)
        base = stock_base(module)
        if base is None or not isinstance(module, SWAPS[base]):
            continue
        if type(module) is SWAPS[base] or _is_parametrized_only(module, SWAPS[base]):
            _become(module, base)
    return model


def stock_base(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn that freezekit has a layer for and that `module` is, nearest first."""
    return next((base for base in type(module).__mro__ if base in SWAPS), None)


def reason_to_leave(module: nn.Module, base: type[nn.Module]) -> str:
    """Why a swap would change what `module` does; "" if it would not."""
    own = [name for name in ("forward", "_conv_forward") if name in module.__dict__]
    if own:
        return f"this instance has its own {own[0]}"
    if replaced := next((name for name in _METHODS if not _is_torchs(base, name)), ""):
        return f"{base.__name__} has another {replaced} than torch gave it"
    if type(module) is base or _is_parametrized_only(module, base):
        return ""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__} is a subclass of {base.__name__} with behaviour of its own"


def _is_torchs(base: type[nn.Module], name: str) -> bool:
    """Whether a method is the one that is written in its class's module."""
    kind = next((kind for kind in base.__mro__ if name in vars(kind)), None)
    written = vars(sys.modules[kind.__module__]) if kind else None
    return kind is None or getattr(vars(kind)[name], "__globals__", None) is written


def _is_parametrized_only(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether the class of `module` is the one that torch makes for parametrizations of a plain `base`."""
    return parametrize.is_parametrized(module) and type(module).__bases__ == (base,)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        # The class that torch made for this module, made again on another base.
        body = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), body)
    module.__class__ = kind


def _selected(model: nn.Module, only: Only | None) -> list[nn.Module]:
    check_module(model)
    if only is None:
        return list(model.modules())
    several = isinstance(only, Iterable) and not isinstance(only, str | type | nn.Module)
    found: dict[int, nn.Module] = {}
    for part in flat(Index(model), [list(only) if several else only], "only"):  # type: ignore[arg-type]
        met = {id(m): m for root in named_modules(model, [part], "only").values() for m in root.modules()}
        if not any(stock_base(m) or plan_of(m) for m in met.values()):
            raise PatternError(f"only: {shown(part)} matches no layer that freezekit has one for")
        found.update(met)
    return list(found.values())
