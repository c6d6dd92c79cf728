"""The units that a schedule freezes: a layer with its parameters, and the norm that follows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel as DDP

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Layer:
    """What is frozen at once.

    Attributes:
        name: the module that gives the layer its name.
        parameters: names of its parameters.
        modules: names of norms without parameters, whose statistics go with the layer.
    """

    name: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...] = ()

    @property
    def patterns(self) -> tuple[str, ...]:
        """What `freezekit.freezing.freeze` is told."""
        return self.parameters + self.modules


def unwrapped(model: nn.Module) -> nn.Module:
    """The module whose parameter names a schedule uses: inside DDP and torch.compile."""
    while True:
        inner = model.module if isinstance(model, DDP) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.running_mean is not None


def _units(model: nn.Module) -> Iterator[tuple[str, list[str], list[str]]]:
    """Modules with parameters of their own in registration order, each with the norms after it."""
    unit: tuple[str, list[str], list[str]] | None = None
    for name, module in model.named_modules():
        own = [f"{name}.{n}" if name else n for n, _ in module.named_parameters(recurse=False)]
        if unit is not None and isinstance(module, _NORMS):
            unit[1].extend(own)
            if _has_statistics(module) and not own:
                unit[2].append(name)
        elif own:
            if unit is not None:
                yield unit
            unit = (name.split(".parametrizations")[0] or "(root)", own, [])
    if unit is not None:
        yield unit


def _named_units(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            near = get_close_matches(name, modules, 3) or list(modules)[1:4]
            raise ValueError(f"layers: the model has no module {name!r}; near names: {', '.join(near)}")
        inside = [f"{name}.{n}" for n, _ in modules[name].named_parameters()]
        bare = [f"{name}.{n}" if n else name for n, m in modules[name].named_modules()
                if _has_statistics(m) and next(m.parameters(recurse=False), None) is None]  # fmt: skip
        if not inside:
            raise ValueError(f"layers: {name!r} has no parameters")
        yield name, inside, bare


def layers_of(model: nn.Module, names: Sequence[str] | None = None) -> tuple[Layer, ...]:
    """The layers of a model, first to last.

    Args:
        model: the model, unwrapped. Parameters that are frozen already are left out.
        names: names of modules that are each to be one layer, in forward order. By default every module with parameters
            of its own is a layer, in order of registration, together with the norms that follow it directly.

    Returns:
        Layers with at least one trainable parameter. A tied parameter belongs to the last layer that has it, so that
        it is never frozen too early.

    Raises:
        ValueError: a name that is no module, or has no parameters, or lies in another; or no layer is trainable.
        TypeError: `names` is no sequence of names.

    Example:
        >>> [l.name for l in layers_of(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)))]
        ['0', '2']
    """
    if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
        raise TypeError(f"layers: expected a sequence of module names, got {names!r}")
    for i, name in enumerate(names or ()):
        if not isinstance(name, str):
            raise TypeError(f"layers: expected names of modules, got {name!r}")
        other = next((n for j, n in enumerate(names or ()) if j != i and (n == name or n.startswith(f"{name}."))), None)
        if other is not None:
            raise ValueError(f"layers: {other!r} is given twice, or lies in {name!r}")
    units = list(_units(model) if names is None else _named_units(model, names))
    everything = dict(model.named_parameters(remove_duplicate=False))
    last = {id(everything[p]): name for name, inside, _ in units for p in inside}
    found = []
    for name, inside, bare in units:
        own = tuple(p for p in inside if last[id(everything[p])] == name and everything[p].requires_grad)
        if own:
            found.append(Layer(name, own, tuple(bare)))
    if not found:
        raise ValueError("the model has no trainable layer to schedule")
    return tuple(found)


def tensors(model: nn.Module, layer: Layer) -> list[nn.Parameter]:
    """The layer's parameters."""
    return [model.get_parameter(name) for name in layer.parameters]


def as_float(value: torch.Tensor) -> float:
    """A 0-dimensional tensor as a number; of a DTensor, the number over all ranks."""
    full = getattr(value, "full_tensor", None)
    return float(full() if full is not None else value)
