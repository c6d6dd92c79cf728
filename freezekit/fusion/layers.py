"""Which layers a fused block may be made of, and whether they are what a frozen one needs right now."""

from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from freezekit import nn as freezekit_nn


def _kinds(*bases: type[nn.Module]) -> frozenset[type[nn.Module]]:
    """The stock classes and freezekit's own ones: a subclass of anybody else may do anything."""
    ours = [c for c in vars(freezekit_nn).values() if isinstance(c, type) and issubclass(c, bases)]
    return frozenset([*bases, *ours])


CONVS = _kinds(nn.Conv2d)
# With what they normalise by: fixed statistics always, or in eval mode alone.
NORMS: dict[type[nn.Module], bool] = dict.fromkeys(_kinds(nn.BatchNorm2d, nn.SyncBatchNorm), False)
_RELUS = _kinds(nn.ReLU)
_RELU6S = _kinds(nn.ReLU6)
ACTIVATIONS: dict[type[nn.Module], str] = {**dict.fromkeys(_RELUS, "relu"), **dict.fromkeys(_RELU6S, "relu6")}

_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")

# What a class's forward calls or reads: a layer that has one of these of its own does something else.
OWN = ("forward", "_call_impl", "_compiled_call_impl", "_conv_forward", "_check_input_dim", *_NORM_TENSORS)


def methods_of(kind: type[nn.Module]) -> dict[str, Any]:
    """What runs when a layer of a class is called."""
    names = ("__call__", "_call_impl", "forward", "_conv_forward", "_check_input_dim")
    return {name: getattr(kind, name) for name in names if hasattr(kind, name)}


# The methods that blocks stand for: somebody may have put, or put later, others into a class.
METHODS: dict[type[nn.Module], dict[str, Any]] = {
    kind: methods_of(kind)
    for kind in (*CONVS, *NORMS, *ACTIVATIONS)
    if kind.forward.__module__.startswith(("torch.nn.modules.", "freezekit."))
}
# And the functions that these and forwards call, which profilers replace.
FUNCTIONS: tuple[tuple[Any, str, Any], ...] = tuple(
    (owner, name, getattr(owner, name))
    for owner, names in {
        F: ("conv2d", "batch_norm", "relu", "relu6", "hardtanh"),
        torch: ("batch_norm", "relu", "relu_"),
        Tensor: ("__add__", "__iadd__", "add_", "relu", "relu_"),
    }.items()
    for name in names
)

# As functions and as names of methods.
ACTIVATION_CALLS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    "relu": "relu",
    "relu_": "relu",
}


def function_kind(function: Any) -> str | None:
    """ "relu" or "relu6" for a function, or for the name of a method; else None."""
    return ACTIVATION_CALLS.get(function) if type(function) in (str, FunctionType, BuiltinFunctionType) else None


def activation_kind(activation: nn.Module | str | None) -> str | None:
    """ "none", "relu" or "relu6"; None for a module that is neither."""
    if activation is None:
        return "none"
    return activation if isinstance(activation, str) else ACTIVATIONS.get(type(activation))


def tensor_of(layer: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of a layer, or None where it has none.

    Read from the modules' dictionaries: `nn.Module.__getattr__` would be a good part of what a small block costs.
    """
    parameters = layer._parameters
    return parameters[name] if name in parameters else layer._buffers.get(name)


def sources(conv: nn.Module, norm: nn.Module | None) -> list[Tensor]:
    """All tensors that a block reads of its layers."""
    found = [tensor_of(conv, "weight"), tensor_of(conv, "bias")]
    if norm is not None:
        found += [tensor_of(norm, name) for name in _NORM_TENSORS]
    return [tensor for tensor in found if tensor is not None]


def norm_tensors(norm: nn.Module) -> dict[str, Any]:
    """A norm as the operator takes it."""
    weight, bias, mean, var = (tensor_of(norm, name) for name in _NORM_TENSORS)
    return {"norm_weight": weight, "norm_bias": bias, "running_mean": mean, "running_var": var, "eps": norm.eps}


def why_unfused(conv: nn.Module, norm: nn.Module | None, activation: nn.Module | str | None) -> str:
    """Why these layers run one by one at this moment; "" if they may run as one."""
    if type(conv) not in CONVS:
        return f"{type(conv).__name__} is not a plain Conv2d"
    if norm is not None and type(norm) not in NORMS:
        return f"{type(norm).__name__} is not a plain BatchNorm2d"
    if activation_kind(activation) is None:
        return f"{type(activation).__name__} is not a plain ReLU or ReLU6"
    assert isinstance(conv, nn.Conv2d)
    if any(tensor.requires_grad for tensor in sources(conv, None)):
        return "the convolution is trainable"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} with mode {conv.padding_mode!r} is not by numbers of zeros"
    own = [set(conv._parameters)] + ([] if norm is None else [{*norm._parameters, *norm._buffers}])
    if not all(name in names for names in own for name in ("weight", "bias")):
        return "a layer in it has no weight of its own: it is a replica, or its weight is made at each call"
    if norm is not None and (reason := _why_norm_is_live(norm)):
        return reason
    for layer in (conv, norm, activation):
        if isinstance(layer, nn.Module) and is_watched(layer):
            return f"a {type(layer).__name__} in it has hooks or a forward of its own"
        if isinstance(layer, nn.Module) and is_patched(type(layer)):
            return f"{type(layer).__name__} has another forward than its library gave it"
    if name := replaced_function():
        return f"torch's {name} is replaced by another function"
    return "hooks are registered for all modules" if has_global_hooks() else ""


def _why_norm_is_live(norm: nn.Module) -> str:
    if norm.training and not NORMS[type(norm)]:
        return "the batch norm normalises with the statistics of the batch"
    if tensor_of(norm, "running_mean") is None or tensor_of(norm, "running_var") is None:
        return "the batch norm has no running statistics"
    if any(isinstance(value, Tensor) and value.requires_grad for value in norm_tensors(norm).values()):
        return "the batch norm is trainable"
    eps: Any = norm.eps
    # Frozen ones of 0 are common: torchvision sets it for weights that it loads. Of batch norms, torch 2.11 refuses it.
    return "" if eps > 0 or (eps == 0 and NORMS[type(norm)]) else f"the batch norm has eps {eps}"


has_global_hooks = _module._has_any_global_hook


def is_watched(layer: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward says."""
    own = layer.__dict__
    return bool(
        any(name in own for name in OWN)
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or (torch.compiler.is_compiling() and not _calls_its_class(layer))
    )


def _calls_its_class(layer: nn.Module) -> bool:
    """Asks once more what a module's dictionary told: compiled code does not look at dictionaries again, but here."""
    kind = type(layer)
    return all(
        getattr(layer, name).__func__ is getattr(kind, name)
        for name in ("forward", "_call_impl", "_conv_forward", "_check_input_dim")
        if hasattr(kind, name)
    )


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether somebody has put other methods into a class that blocks are made of."""
    known = METHODS.get(kind)
    return known is None or any(getattr(kind, name) is not method for name, method in known.items())


def replaced_function() -> str:
    """The name of a function of torch's that somebody has replaced; "" without one."""
    return next((name for owner, name, function in FUNCTIONS if getattr(owner, name) is not function), "")
