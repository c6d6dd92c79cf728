"""The units that a schedule freezes: a layer with its parameters, and the norm that follows it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from freezekit._arguments import check_module, shown
from freezekit.freezing.norm import has_statistics
from freezekit.freezing.patterns import named_modules

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


def _units(model: nn.Module) -> Iterator[tuple[str, list[str], list[str]]]:
    """Modules with parameters of their own in registration order, each with the norms after it."""
    unit: tuple[str, list[str], list[str]] | None = None
    for name, module in model.named_modules():
        own = [f"{name}.{n}" if name else n for n, _ in module.named_parameters(recurse=False)]
        if unit is not None and isinstance(module, _NORMS):
            unit[1].extend(own)
            if has_statistics(module) and not own:
                unit[2].append(name)
        elif own:
            layer = name.split(".parametrizations")[0] or "(root)"
            if unit is not None and unit[0] == layer:  # the bias of a layer whose weight is parametrized
                unit[1].extend(own)
                continue
            if unit is not None:
                yield unit
            unit = (layer, own, [])
    if unit is not None:
        yield unit


def _named_units(model: nn.Module, patterns: Sequence[Any]) -> Iterator[tuple[str, list[str], list[str]]]:
    found = named_modules(model, patterns, "layers")
    for name, module in found.items():
        other = next((n for n in found if n != name and n.startswith(f"{name}.")), None)
        if other is not None:
            raise ValueError(f"layers: {other!r} is inside {name!r}, which is a layer too")
        inside = [f"{name}.{n}" for n, _ in module.named_parameters()]
        bare = [f"{name}.{n}" if n else name for n, m in module.named_modules()
                if has_statistics(m) and next(m.parameters(recurse=False), None) is None]  # fmt: skip
        if not inside:
            raise ValueError(f"layers: {name!r} has no parameters")
        yield name, inside, bare


def layers_of(model: nn.Module, patterns: Sequence[Any] | None = None) -> tuple[Layer, ...]:
    """The layers of a model, first to last.

    Args:
        model: the model, unwrapped. Parameters that are frozen already are left out.
        patterns: modules that are each to be one layer, in forward order: names, globs, classes or modules, as for
            `freezekit.freeze`. By default every module with parameters of its own is a layer, in order of
            registration, together with the norms that follow it directly.

    Returns:
        Layers with at least one trainable parameter. A tied parameter belongs to the last layer that has it, so that
        it is never frozen too early.

    Raises:
        ValueError: a pattern that no module meets, a module without parameters, or one inside another; or no layer is
            trainable.
        TypeError: `patterns` is not a sequence of patterns.

    Example:
        >>> [l.name for l in layers_of(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)))]
        ['0', '2']
    """
    check_module(model)
    if patterns is not None and (isinstance(patterns, str) or not isinstance(patterns, Sequence)):
        raise TypeError(f"layers must be a sequence of names of modules or other patterns, got {shown(patterns)}")
    units = list(_units(model) if patterns is None else _named_units(model, patterns))
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
