"""Convolutions whose gradients are operators of their own, so that a gradient that is not needed is never computed."""

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from freezekit import _C, backends
from freezekit._arguments import Size2, number, numbers, plain
from freezekit.backends import Backend, check_backend
from freezekit.functional._torch import padded_to_same, records_as_torch, tell_quantizer

# A call of plain tensors and numbers; None of any other.
_quick = _C.quick.conv2d
_conv2d = torch.ops.freezekit.conv2d.default
_conv2d_dgrad = torch.ops.freezekit.conv2d_dgrad.default
_conv2d_wgrad = torch.ops.freezekit.conv2d_wgrad.default
_conv2d_bias_grad = torch.ops.freezekit.conv2d_bias_grad.default


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d`, keeping and computing only what the gradients asked for need.

    Where `weight` needs no gradient, `input` is not kept and no wgrad runs; where `input` needs none, no dgrad runs;
    where only `bias` learns, nothing is kept at all. Whether a gradient is needed is read from `requires_grad` of the
    tensors of this call, and in the backward pass from what autograd asks for. Under torch.func transforms and
    forward-mode AD, for complex tensors and for DTensors it is torch's own convolution, formulas and all.

    Args:
        input: (N, C, H, W), or (C, H, W) unbatched; any floating dtype, or complex (computed as torch does).
        weight: (K, C / groups, R, S), of the same dtype and device.
        bias: (K,), or None.
        stride: one number, or (height, width); at least 1.
        padding: zeros added on both sides, one number or (height, width); or ``"valid"``, or ``"same"`` (stride 1).
        dilation: distance between the kernel's elements, one number or (height, width); at least 1.
        groups: divides C and K.
        backend: see :class:`freezekit.backend`; None takes the current one.

    Returns:
        (N, K, P, Q), or (K, P, Q) unbatched; P = (H + 2 padding - dilation (R - 1) - 1) // stride + 1, Q likewise.

    Raises:
        TypeError: if an argument has a wrong type.
        RuntimeError: if sizes, dtypes, devices or settings do not fit; the text names argument, expectation and value.
        ValueError: if `backend` is not a backend.

    >>> import torch, freezekit as fk
    >>> x = torch.randn(2, 3, 8, 8, requires_grad=True)
    >>> frozen = torch.randn(4, 3, 3, 3)
    >>> y = fk.functional.conv2d(x, frozen, padding="same")
    >>> y.shape
    torch.Size([2, 4, 8, 8])
    >>> y.sum().backward()  # runs dgrad alone; x was not kept
    """
    if backend is None and not is_dynamo_compiling():
        y = _quick(input, weight, bias, stride, padding, dilation, groups)
        if y is not None:
            return y
    if has_torch_function_variadic(input, weight, bias):
        tell_quantizer(input)
        return handle_torch_function(
            conv2d, (input, weight, bias), input, weight, bias, stride, padding, dilation, groups, backend=backend
        )
    _check_tensor("input", input)
    _check_tensor("weight", weight)
    if bias is not None:
        _check_tensor("bias", bias)
    if backend is None and backends._current in ("auto", "aten"):
        of_nothing = weight.dim() == 4 and weight.shape[1] == 0  # of which torch makes no channels
        if of_nothing or records_as_torch(input, weight, bias):
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if not plain(stride, padding, dilation, groups):
        stride, dilation, groups = numbers("stride", stride), numbers("dilation", dilation), number("groups", groups)
        if not isinstance(padding, str):
            padding = numbers("padding", padding)
    dim = input.dim()
    if dim != 4 and dim != 3:
        raise RuntimeError(
            f"input must have 4 dimensions (N, C, H, W), or 3 (C, H, W) unbatched, got {dim}: {list(input.shape)}"
        )
    if isinstance(padding, str):
        input, padding = _resolve_padding(padding, input, weight, stride, dilation)
    name = _backend_name(backend)
    if type(input) is not Tensor and _is_dtensor(input):
        if name not in ("auto", "aten"):
            _C.refuse("conv2d", name, "it does not take a DTensor")
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    settings = _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups
    if dim == 3:
        return _conv2d(input.unsqueeze(0), weight, bias, *settings, backend=name).squeeze(0)
    return _conv2d(input, weight, bias, *settings, backend=name)


def conv2d_dgrad(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """The gradient of :func:`conv2d` with respect to its input; needs no input, only its size. Differentiable.

    Args:
        grad_output: (N, K, P, Q).
        weight: (K, C / groups, R, S).
        input_size: (N, C, H, W).
        stride, padding, dilation, groups, backend: as for :func:`conv2d`; no string padding.

    Returns:
        (N, C, H, W).

    Raises:
        TypeError, RuntimeError, ValueError: as :func:`conv2d`.

    >>> import torch, freezekit as fk
    >>> fk.functional.conv2d_dgrad(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), (1, 1, 3, 3))[0, 0, 1]
    tensor([2., 4., 2.])
    """
    _check_tensor("grad_output", grad_output)
    _check_tensor("weight", weight)
    size = _size("input_size", input_size)
    settings = _settings(stride, padding, dilation)
    name = _backend_name(backend)
    return _conv2d_dgrad(grad_output, weight, size, *settings, number("groups", groups), backend=name)


def conv2d_wgrad(
    grad_output: Tensor,
    input: Tensor,
    weight_size: Sequence[int],
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """The gradient of :func:`conv2d` with respect to its weight; needs no weight, only its size. Differentiable.

    Args:
        grad_output: (N, K, P, Q).
        input: (N, C, H, W).
        weight_size: (K, C / groups, R, S).
        stride, padding, dilation, groups, backend: as for :func:`conv2d`; no string padding.

    Returns:
        (K, C / groups, R, S).

    Raises:
        TypeError, RuntimeError, ValueError: as :func:`conv2d`.

    >>> import torch, freezekit as fk
    >>> fk.functional.conv2d_wgrad(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3), (1, 1, 2, 2))[0, 0]
    tensor([[4., 4.],
            [4., 4.]])
    """
    _check_tensor("grad_output", grad_output)
    _check_tensor("input", input)
    size = _size("weight_size", weight_size)
    settings = _settings(stride, padding, dilation)
    name = _backend_name(backend)
    return _conv2d_wgrad(grad_output, input, size, *settings, number("groups", groups), backend=name)


def conv2d_bias_grad(grad_output: Tensor, *, backend: Backend | None = None) -> Tensor:
    """The gradient of :func:`conv2d` with respect to its bias: a sum over all but the channels. Differentiable.

    Args:
        grad_output: (N, K, P, Q), in any layout; N may be 0.
        backend: see :class:`freezekit.backend`; None takes the current one. Freezekit's own kernels add in an order
            that depends on the sizes alone: the same values give the same bits on every run.

    Returns:
        (K,).

    Raises:
        TypeError, RuntimeError, ValueError: as :func:`conv2d`.

    >>> import torch, freezekit as fk
    >>> fk.functional.conv2d_bias_grad(torch.ones(2, 3, 4, 4))
    tensor([32., 32., 32.])
    """
    _check_tensor("grad_output", grad_output)
    return _conv2d_bias_grad(grad_output, backend=_backend_name(backend))


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def _backend_name(backend: Backend | None) -> str:
    if backend is None:
        return backends._current
    check_backend(backend)
    return backend


def _is_dtensor(tensor: Tensor) -> bool:
    """Without importing torch.distributed.tensor, which takes seconds: where there is a DTensor, it is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _size(name: str, value: object) -> list[int]:
    size = numbers(name, value)
    if isinstance(size, int):
        raise TypeError(f"{name} must be a list of 4 integers, got {value!r}")
    return size


def _settings(stride: Size2, padding: Size2, dilation: Size2) -> list[tuple[int, int]]:
    named = {"stride": stride, "padding": padding, "dilation": dilation}
    return [_pair(name, numbers(name, value)) for name, value in named.items()]


def _pair(name: str, value: Size2) -> tuple[int, int]:
    if isinstance(value, Sequence):
        if len(value) not in (1, 2):
            raise RuntimeError(f"{name} must be one number or two (height, width), got {len(value)} of them: {value}")
        return value[0], value[-1]
    return value, value


def _resolve_padding(
    padding: str, input: Tensor, weight: Tensor, stride: Size2, dilation: Size2
) -> tuple[Tensor, tuple[int, ...]]:
    """String padding as numbers, see `padded_to_same`."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"padding must be numbers, 'valid' or 'same', got {padding!r}")
    if _pair("stride", stride) != (1, 1):
        raise RuntimeError(f"padding='same' needs stride 1, got stride {stride}")
    if weight.dim() != 4:
        raise RuntimeError(f"weight must have 4 dimensions, got {weight.dim()}: {list(weight.shape)}")
    # A trace records sizes as tensors, which the operator takes for no number; a kernel's are constants.
    kernel = [int(k) if isinstance(k, Tensor) else k for k in weight.shape[2:]]
    spans = [d * (k - 1) for d, k in zip(_pair("dilation", dilation), kernel)]
    if min(spans) < 0:
        raise RuntimeError(f"dilation must be positive and the kernel not empty, got {dilation}, {list(weight.shape)}")
    return padded_to_same(input, spans)
