"""What replaces a convolution and the layers behind it in a rewritten forward: one operator, or the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import freezekit._C as _C
from freezekit import backends
from freezekit._twin import is_plain
from freezekit.functional._torch import jit_trace, records_torch_s
from freezekit.fusion.layers import (
    ACTIVATIONS,
    CONVS,
    FORWARDS,
    NORMS,
    OWN,
    activation_kind,
    norm_tensors,
    sources,
    why_unfused,
)

_frozen = torch.ops.freezekit.frozen_conv2d.default
_shared = torch.ops.freezekit.frozen_conv2d_shared.default
# The call where all is plainly fit for one operator, without Python; None where it is not, and `_runs_fused` decides.
_run = _C.blocks.run
_C.blocks.know(CONVS, NORMS, ACTIVATIONS, OWN, FORWARDS)


def run(
    x: Any,
    conv: nn.Module,
    norm: nn.Module | None,
    activation: nn.Module | str | None,
    residual: Tensor | None,
    shares: bool = False,
) -> Any:
    """activation(norm(conv(x)) + residual) as one operator; None where the layers have to run one by one.

    Args:
        x: (N, C, H, W).
        conv, norm, activation: the layers; norm and activation may be absent, activation may be a function's name.
        residual: of the size of the result, or None.
        shares: returns x too, for its later readers: their gradients are added inside this one's dgrad.
    """
    if jit_trace() is not None and not backends.demands_kernels():
        return None  # an archive of torch's operators loads without freezekit
    if not torch.compiler.is_compiling():
        y = _run(x, conv, norm, activation, residual, backends._current, shares)
        if y is not None:
            return y
    if not _runs_fused(x, conv, norm, activation, residual):
        return None
    if not backends.demands_kernels() and records_torch_s(x, residual, *sources(conv, norm)):
        return None
    result = _fused(_shared if shares else _frozen, x, conv, norm, activation, residual)
    return result if shares else result[0]


def _fused(
    operator: Any,
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module | None,
    activation: nn.Module | str | None,
    residual: Tensor | None,
) -> Any:
    assert isinstance(conv, nn.Conv2d)
    settings = (activation_kind(activation), conv.stride, conv.padding, conv.dilation, conv.groups)
    live = {} if norm is None else norm_tensors(norm)
    return operator(
        x,
        conv._parameters["weight"],
        conv._parameters["bias"],
        residual,
        *settings,
        **live,
        backend=backends._current,
    )


def _runs_fused(
    x: Tensor, conv: nn.Module, norm: nn.Module | None, activation: nn.Module | str | None, residual: Tensor | None
) -> bool:
    if why_unfused(conv, norm, activation):
        return False
    assert isinstance(conv, nn.Conv2d)
    weight = conv._parameters["weight"]
    assert weight is not None
    if not _is_plain(x, weight) or not _fits(x, conv) or any(map(_is_transformed, sources(conv, norm))):
        return False
    dtype = x.dtype
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        if torch.float64 in (x.dtype, weight.dtype):
            return False
        dtype = torch.get_autocast_dtype(x.device.type)
    elif dtype != weight.dtype:
        return False
    if norm is not None and not _keeps_dtype(norm, dtype):
        return False
    return residual is None or (residual.dtype == dtype and _adds(x, conv, residual))


def _keeps_dtype(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a norm takes values of this dtype and gives them back in it.

    torch's batch norm takes 16 bits beside parameters of float32. Norms that are always fixed multiply and add: there
    the wider dtype wins.
    """
    own = {tensor.dtype for tensor in norm_tensors(norm).values() if isinstance(tensor, Tensor)}
    if own == {dtype}:
        return True
    return not NORMS[type(norm)] and dtype in (torch.bfloat16, torch.float16) and own == {torch.float32}


def _is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func wraps a tensor; a compiler looks for itself."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    return is_plain(x) and x.dim() == 4 and x.device == weight.device and x.is_floating_point()


def _fits(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether sizes are right; where they are not, the layers themselves say so."""
    return x.shape[1] == conv.in_channels and min(_output_size(x, conv)) >= 1


def _output_size(x: Tensor, conv: nn.Conv2d) -> tuple[int, int]:
    p, d, k, s = conv.padding, conv.dilation, conv.kernel_size, conv.stride
    return (
        (x.shape[2] + 2 * int(p[0]) - d[0] * (k[0] - 1) - 1) // s[0] + 1,
        (x.shape[3] + 2 * int(p[1]) - d[1] * (k[1] - 1) - 1) // s[1] + 1,
    )


def _adds(x: Tensor, conv: nn.Conv2d, residual: Tensor) -> bool:
    """Whether a residual is added element by element; one that is broadcast is left to the layers."""
    return (
        is_plain(residual)
        and residual.device == x.device
        and tuple(residual.shape) == (x.shape[0], conv.out_channels, *_output_size(x, conv))
    )
