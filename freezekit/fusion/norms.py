"""Norms of other libraries that a block takes in: those that compute what a batch norm with fixed statistics does.

They have the batch norm's tensors by the batch norm's names, as parameters or buffers, and ``eps``:

    y = (x - running_mean) / sqrt(running_var + eps) * weight + bias

Some also drop out and activate in the end (timm). A class is known by its name, and taken at its word only once a
layer of it was seen to give these values.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from freezekit._arguments import shown
from freezekit.fusion.layers import METHODS, NORMS, has_global_hooks, methods_of

# By name, and whether the statistics are fixed while training too.
_NAMES = {
    "torchvision.ops.misc.FrozenBatchNorm2d": True,
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": True,
    "timm.layers.norm_act.BatchNormAct2d": False,
    "timm.layers.norm_act.FrozenBatchNormAct2d": True,
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_registered: dict[type[nn.Module], bool] = {}
_refused: set[type[nn.Module]] = set()


def register_norm(kind: type[nn.Module], *, always_fixed: bool) -> None:
    """Lets blocks take in a norm of another library, or of yours.

    Args:
        kind: its class. Its layers have ``eps`` and the tensors ``weight``, ``bias`` (either may be None),
            ``running_mean`` and ``running_var``, and compute ``(x - running_mean) / sqrt(running_var + eps) * weight +
            bias``; then they may pass through a ``drop`` and an ``act`` of theirs. The first one that `fuse` meets must
            give these values, or none is taken in. Subclasses are other classes.
        always_fixed: whether it does so while training too, and not in eval mode alone.

    Raises:
        TypeError: if `kind` is not a class of modules, or `always_fixed` is not a bool.

    >>> from torch import nn
    >>> from freezekit.fusion.norms import register_norm
    >>> class MyNorm(nn.BatchNorm2d):
    ...     pass
    >>> register_norm(MyNorm, always_fixed=False)
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise TypeError(f"kind must be a class of nn.Module, got {shown(kind)}")
    if not isinstance(always_fixed, bool):
        raise TypeError(f"always_fixed must be a bool, got {shown(always_fixed)}")
    _registered[kind] = always_fixed
    _refused.discard(kind)


def is_norm(module: nn.Module) -> bool:
    """Whether a block may take in a layer of this class."""
    kind = type(module)
    fixed = _registered.get(kind, _NAMES.get(f"{kind.__module__}.{kind.__qualname__}"))
    # Hooks for all modules are not for a layer of ours: such a class is met another time.
    if kind not in NORMS and kind not in _refused and fixed is not None and not has_global_hooks():
        if _computes_it(module):
            NORMS[kind], METHODS[kind] = fixed, methods_of(kind)
        else:
            _refused.add(kind)
    return kind in NORMS


def has_activation(module: nn.Module | None) -> bool:
    """Whether a norm activates on its own, and may drop out before."""
    return module is not None and module._modules.get("act") is not None


def _computes_it(module: nn.Module) -> bool:
    """Whether a layer of the same settings gives a batch norm's values, on tensors that would show it if not."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.device("cpu"):
        # All its tensors are drawn anew, and none is copied: those of a layer that `explain` looks at hold no data. Nor
        # are hooks: they are somebody's who waits for other values.
        new: dict[int, Any] = {id(t): _drawn(t, generator) for t in (*module.parameters(), *module.buffers())}
        for part in module.modules():
            new |= {id(value): type(value)() for name, value in vars(part).items() if name.endswith("_hooks")}
        norm: Any = copy.deepcopy(module, new).eval()
        tensors = [getattr(norm, name, None) for name in _TENSORS]
        if any(tensor is not None and not isinstance(tensor, Tensor) for tensor in tensors):
            return False
        weight, bias, mean, var = tensors
        if mean is None or var is None or not isinstance(getattr(norm, "eps", None), float):
            return False
        if norm.eps <= 0:
            norm.eps = 0.01  # torch 2.11 has no batch norm without one to compare with
        x = torch.randn(2, mean.numel(), 2, 3, generator=generator, dtype=torch.float64)
        expected = nn.functional.batch_norm(x, mean, var, weight, bias, eps=float(norm.eps))
        if has_activation(norm):
            drop = norm._modules.get("drop")
            expected = norm.act(expected.clone() if drop is None else drop(expected.clone()))
        given = norm(x)
        return given.shape == expected.shape and torch.allclose(given, expected, rtol=1e-9, atol=1e-9)


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Positive values for a tensor of this kind and shape."""
    made = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    return nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made
