"""What a rewritten forward calls: one operator in place of a convolution and the layers behind it, or the layers.

A layer or a residual that a forward has is never None for such a call: where it is None at the time, the layers are
to say so.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.overrides import _get_current_function_mode_stack

import freezekit._C as _C
from freezekit import backends
from freezekit._twin import is_plain
from freezekit.functional._torch import jit_trace, records_as_torch
from freezekit.fusion.layers import (
    ACTIVATIONS,
    CONVS,
    FUNCTIONS,
    METHODS,
    NORMS,
    OWN,
    activation_kind,
    function_kind,
    is_watched,
    norm_tensors,
    sources,
    why_unfused,
)
from freezekit.fusion.norms import has_activation
from freezekit.fusion.sequences import children_of_list, children_of_sequence, has_shape

ABSENT = object()  # a layer that the block does not have

_frozen = torch.ops.freezekit.frozen_conv2d.default
# The call where all is plainly fit for one operator, without Python; None where it is not, and `_runs_fused` decides.
_run = _C.blocks.run
_C.blocks.know(CONVS, NORMS, ACTIVATIONS, OWN, METHODS, FUNCTIONS)


def fused(
    x: Any,
    conv: Any,
    norm: Any = ABSENT,
    activation: Any = ABSENT,
    residual: Any = ABSENT,
    owns: bool = False,
    shares: bool = False,
) -> Any:
    """activation(norm(conv(x)) + residual) as one operator; None where the layers have to run one by one.

    Args:
        x: (N, C, H, W).
        conv, norm, activation: the layers, or what takes their places; an activation may be a function or the name
            of a method.
        residual: what is added, of the size of the result.
        owns: whether the norm has an activation of its own, which is part of the block or runs behind it.
        shares: returns x too, for blocks that read it after: their gradients are added inside this one's dgrad where
            possible.
    """
    if norm is None or activation is None or residual is None or type(conv) not in CONVS:
        return None
    if residual is not ABSENT and not is_plain(residual):
        return None
    if norm is not ABSENT and has_activation(norm) is not owns:
        return None
    if not isinstance(activation, nn.Module) and activation is not ABSENT:
        activation = function_kind(activation)
        if activation is None:
            return None
    norm, activation, residual = (None if part is ABSENT else part for part in (norm, activation, residual))
    if jit_trace() is not None and not backends.demands_kernels():
        return None  # an archive of torch's operators loads without freezekit
    if not torch.compiler.is_compiling():
        y = _run(x, conv, norm, activation, residual, backends._current, shares)
        if y is not None:
            return y
    y = _by_operator(x, conv, norm, activation, residual)
    return (y, x) if shares and y is not None else y


def _by_operator(
    x: Any, conv: nn.Conv2d, norm: nn.Module | None, activation: nn.Module | str | None, residual: Tensor | None
) -> Tensor | None:
    if not _runs_fused(x, conv, norm, activation, residual):
        return None
    if not backends.demands_kernels() and records_as_torch(x, residual, *sources(conv, norm)):
        return None
    settings = (activation_kind(activation), conv.stride, conv.padding, conv.dilation, conv.groups)
    live = {} if norm is None else norm_tensors(norm)
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    y, _ = _frozen(x, weight, bias, residual, *settings, **live, backend=backends._current)
    return y if _is_laid_out_as_by_layers(y, activation, residual) else None


def _runs_fused(
    x: Tensor, conv: nn.Conv2d, norm: nn.Module | None, activation: nn.Module | str | None, residual: Tensor | None
) -> bool:
    if why_unfused(conv, norm, activation) or _is_watched_by_a_mode():
        return False
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    assert weight is not None
    own = sources(conv, norm)
    if not all(map(_is_plain, (x, *own))) or any(map(_is_transformed, own)):
        return False
    if x.dim() != 4 or not x.is_floating_point() or any(tensor.device != x.device for tensor in own):
        return False
    size = _output_size(x, conv, weight)
    if min(size) < 1 or any(t.dim() != 1 or t.shape[0] != weight.shape[0] for t in own if t is not weight):
        return False
    dtype = x.dtype
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        if torch.float64 in (x.dtype, weight.dtype):
            return False
        dtype = torch.get_autocast_dtype(x.device.type)
    elif dtype != weight.dtype:
        return False
    if bias is not None and bias.dtype != weight.dtype:
        return False
    if norm is not None and not _keeps_dtype(norm, dtype):
        return False
    return residual is None or (
        _is_plain(residual)
        and (residual.dtype, residual.device) == (dtype, x.device)
        and tuple(residual.shape) == (x.shape[0], weight.shape[0], *size)
    )


def _is_watched_by_a_mode() -> bool:
    """Whether somebody's mode may make something else of torch's functions; torch's own and freezekit's do not."""
    if torch.compiler.is_compiling():
        return False
    known = ("torch.", "freezekit.")
    return any(not type(mode).__module__.startswith(known) for mode in _get_current_function_mode_stack())


def _is_plain(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.layout is torch.strided


def _is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func wraps a tensor; a compiler looks for itself."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _output_size(x: Tensor, conv: nn.Conv2d, weight: Tensor) -> tuple[int, int]:
    """Of a result; (0, 0) where sizes or numbers are not right: the layers themselves say so."""
    p, s, d, groups = conv.padding, conv.stride, conv.dilation, conv.groups
    pairs: Any = ((p, 0), (s, 1), (d, 1))
    if not all(
        type(pair) is tuple and len(pair) == 2 and all(type(n) is int and n >= least for n in pair)
        for pair, least in pairs
    ):
        return 0, 0
    if type(groups) is not int or groups < 1 or weight.dim() != 4 or weight.shape[0] % groups:
        return 0, 0
    if x.shape[1] != weight.shape[1] * groups:
        return 0, 0
    height, width = (
        (x.shape[2 + i] + 2 * int(p[i]) - d[i] * (weight.shape[2 + i] - 1) - 1) // s[i] + 1 for i in range(2)
    )
    return height, width


def _keeps_dtype(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a norm takes values of this dtype and gives them back in it.

    torch's batch norm takes 16 bits beside parameters of float32. Norms that are always fixed multiply and add: there
    the wider dtype wins.
    """
    own = {tensor.dtype for tensor in norm_tensors(norm).values() if isinstance(tensor, Tensor)}
    if own == {dtype}:
        return True
    return not NORMS[type(norm)] and dtype in (torch.bfloat16, torch.float16) and own == {torch.float32}


def _is_laid_out_as_by_layers(y: Tensor, activation: nn.Module | str | None, residual: Tensor | None) -> bool:
    """Whether the layers give the operator's strides, in place or not, added in either order.

    The operator's own layout is asked of what it made, which while tracing costs nothing.
    """
    if activation is None and residual is None:
        return True
    # What is both formats turns to NCHW in torch's elementwise operators.
    turns = y.is_contiguous() and suggest_memory_format(y) is torch.channels_last
    return not turns and (residual is None or residual.stride() == y.stride())


def is_identity(module: Any) -> bool:
    return type(module) is nn.Identity and not is_watched(module)


def drops_nothing(norm: Any) -> bool:
    """Whether a norm with an activation of its own passes all on to it."""
    if not isinstance(norm, nn.Module) or not has_activation(norm):
        return False
    return "drop" not in norm._modules or is_identity(norm._modules["drop"])


# By their names in rewritten forwards, less the prefix.
NAMES = {
    "absent": ABSENT,
    "fused": fused,
    "children_of_list": children_of_list,
    "children_of_sequence": children_of_sequence,
    "has_shape": has_shape,
    "own_forward": nn.Sequential.forward,
    "is_identity": is_identity,
    "drops_nothing": drops_nothing,
    "torch_add": torch.add,
}
