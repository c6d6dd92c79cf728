"""Turns a model's layers into freezekit's, in place, and tells what it did and what it left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from freezekit.nn import FreezableConv2d

Model = TypeVar("Model", bound=nn.Module)

SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: FreezableConv2d}


@dataclass(frozen=True)
class LayerReport:
    """One layer of a conversion report.

    Attributes:
        name: where the layer stands in the model; "" is the model itself.
        layer: its class's name.
        status: "freezekit" (is one of freezekit's), "stock" (`convert` would swap it), or "left alone".
        reason: why a layer is left alone; "" otherwise.
    """

    name: str
    layer: str
    status: str
    reason: str = ""


def conversion_report(model: nn.Module) -> list[LayerReport]:
    """What of `model` is freezekit's, what `convert` would swap, and what it leaves alone, and why.

    Lists layers of the kinds that freezekit replaces, subclasses included, a shared one once.

    >>> from torch import nn
    >>> import freezekit as fk
    >>> fk.conversion_report(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    [LayerReport(name='0', layer='Conv2d', status='stock', reason='')]
    """
    rows = []
    for name, module in model.named_modules():
        base = _stock_base(module)
        if base is None:
            continue
        layer = type(module).__name__
        if isinstance(module, SWAPS[base]):
            rows.append(LayerReport(name, layer, "freezekit"))
        else:
            reason = _reason_to_leave(module, base)
            rows.append(LayerReport(name, layer, "left alone" if reason else "stock", reason))
    return rows


def convert(model: Model) -> Model:
    """Makes every `nn.Conv2d` of `model` a `FreezableConv2d`, in place.

    Parameters, buffers, hooks, names, parametrizations, shared modules and attributes stay the same objects: only the
    class changes. Subclasses of users, and modules with a `forward` or `_conv_forward` of their own, are left alone;
    `conversion_report` lists them.

    Args:
        model: any module; a single layer too.

    Returns:
        The same object.

    Raises:
        TypeError: if `model` is no nn.Module.

    >>> from torch import nn
    >>> import freezekit as fk
    >>> fk.convert(nn.Sequential(nn.Conv2d(3, 4, 1)))
    Sequential(
      (0): FreezableConv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        base = _stock_base(module)
        if base is None or isinstance(module, SWAPS[base]) or _reason_to_leave(module, base):
            continue
        if parametrize.is_parametrized(module):
            module.__class__ = _rebase(type(module), SWAPS[base])
        else:
            module.__class__ = SWAPS[base]
    return model


def _stock_base(module: nn.Module) -> type[nn.Module] | None:
    return next((base for base in SWAPS if isinstance(module, base)), None)


def _reason_to_leave(module: nn.Module, base: type[nn.Module]) -> str:
    """Why a swap would change what `module` does; "" if it would not."""
    own = [name for name in ("forward", "_conv_forward") if name in module.__dict__]
    if own:
        return f"this instance has its own {own[0]}"
    kind = type(module)
    if kind is base or (parametrize.is_parametrized(module) and kind.__bases__ == (base,)):
        return ""
    return f"{kind.__module__}.{kind.__qualname__} is a subclass of {base.__name__} with behaviour of its own"


def _rebase(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The class that torch made for a parametrized module, made again on another base."""
    body = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), body)
