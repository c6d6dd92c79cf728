"""Tensors that a module computes anew at each forward: by a parametrization, weight norm, spectral norm or pruning.

Such a weight is no parameter. What trains is what it is made of (``weight_g`` and ``weight_v``, ``weight_orig``,
``parametrizations.weight.original``), and a frozen weight is one of which all that holds still.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm

from freezekit.freezing.norm import has_statistics


def computed(module: nn.Module) -> dict[str, list[str]]:
    """Name of each tensor that ``module`` itself computes -> what it is made of, by names relative to ``module``.

    What is made of something that is computed too is followed to the end. A name in the list is a parameter's, or that
    of a parametrization without any.

    >>> computed(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    {'weight': ['parametrizations.weight.original0', 'parametrizations.weight.original1']}
    """
    lists = _parametrized(module)
    if not (lists or module._parameters):
        return {}
    names = [*lists, *_set_by_hooks(module)]
    first = {name: _inside(module, name) if name in lists else _named_after(module, name, names) for name in names}
    return {name: list(_followed(name, first)) for name in names if first[name]}


def _parametrized(module: nn.Module) -> list[str]:
    if not is_parametrized(module):
        return []
    return [name for name, _ in module.get_submodule("parametrizations").named_children()]


def _set_by_hooks(module: nn.Module) -> Iterator[str]:
    """Names of plain tensors of ``module`` that its pre-hooks compute, or that came out of a computation.

    Another plain tensor beside parameters that are named after it, as integer weights beside a scale, is not computed.
    """
    hooks = module._forward_pre_hooks.values()
    named = {getattr(hook, "_tensor_name", getattr(hook, "name", None)) for hook in hooks}
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and (name in named or not value.is_leaf):
            yield name


def _inside(module: nn.Module, name: str) -> list[str]:
    """The parameters in the parametrizations of ``name``."""
    inside = f"parametrizations.{name}"
    params = module.get_submodule(inside).named_parameters(remove_duplicate=False)
    return [f"{inside}.{known}" for known, _ in params] or [inside]


def _named_after(module: nn.Module, name: str, computed: list[str]) -> list[str]:
    """The parameters that a hook makes ``name`` of: torch's by their endings, others' by their beginning."""
    own = [known for known in (*module._parameters, *computed) if known.startswith(f"{name}_")]
    for endings in (("_orig",), ("_g", "_v")):
        if all(name + ending in own for ending in endings):
            return [name + ending for ending in endings]
    return own


def _followed(name: str, first: dict[str, list[str]]) -> Iterator[str]:
    for part in first[name]:
        yield from _followed(part, first) if part in first else (part,)


def statistics_inside(module: nn.Module, name: str) -> list[nn.Module]:
    """The modules whose running statistics move the tensor ``name`` that ``module`` computes, as spectral norm's do."""
    hooks = module._forward_pre_hooks.values()
    if any(isinstance(hook, SpectralNorm) and hook.name == name for hook in hooks):
        return [module]
    if name not in _parametrized(module):
        return []
    return [part for part in module.get_submodule(f"parametrizations.{name}").modules() if has_statistics(part)]
