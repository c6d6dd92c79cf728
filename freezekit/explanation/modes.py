"""What listens while a model runs without data: the functions that it calls, and the operators that these run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from freezekit.explanation import fused
from freezekit.explanation.record import Call

if TYPE_CHECKING:
    from freezekit.explanation.trace import Recorder

BATCH_NORMS = (torch.ops.aten.native_batch_norm, torch.ops.aten._native_batch_norm_legit)
FREEZEKIT_CONVS = (torch.ops.freezekit.conv2d.default, *fused.OPERATORS)


class Functions(TorchFunctionMode):
    """Keeps the name of the torch function that is running, outermost first."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.stack: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.stack.append(getattr(func, "__name__", str(func)))
        try:
            result = func(*args, **(kwargs or {}))
            if len(self.stack) == 1:
                self.recorder.note_function((args, kwargs), result)
            return result
        finally:
            self.stack.pop()


class Operators(TorchDispatchMode):
    """Adds up what the operators compute and move, for the call that is running."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind, block = func.overloadpacket, func in fused.OPERATORS
        if block:
            self.recorder.start_block()
        result = func(*args, **kwargs)
        if kind in BATCH_NORMS and self.recorder.on_cpu and not args[5]:
            self.recorder.leave_out(result[1:])  # A CPU kernel leaves these empty in eval mode; Meta does not say so.
        call = self.recorder.current()
        if call is None:
            return result
        if block:
            note(call, args, result)
            call.output_needs_grad = call.input_needs_grad  # Here, below autograd, the result does not know yet.
        if kind in flop_registry:
            call.flops += flop_registry[kind](*args, **kwargs, out_val=result)
        elif func in FREEZEKIT_CONVS:
            y = result if isinstance(result, Tensor) else result[0]
            call.flops += conv_flop_count(args[0].shape, args[1].shape, list(y.shape), transposed=False)
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            call.moved += sum(t.numel() * t.element_size() for t in tensors)
        return result


def note(call: Call, arguments: Any, result: Any) -> None:
    """Shapes and needs of the first tensors in and out; in-place ones by what they were on the way in."""
    if tensors := [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]:
        call.inputs = tuple(tensors[0].shape)
        call.channels_last = suggest_memory_format(tensors[0]) == torch.channels_last
        call.input_needs_grad = any(map(_needs_grad, tensors))
    if tensors := [t for t in tree_leaves(result) if isinstance(t, Tensor)]:
        call.outputs = tuple(tensors[0].shape)
        call.output_needs_grad = any(map(_needs_grad, tensors))


def _needs_grad(tensor: Tensor) -> bool:
    """Of a tensor within a torch.func transform: whether the one that it stands for does."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def fallback(inputs: Any) -> str:
    """Why a layer of freezekit's is torch's own in this call, and keeps what torch keeps; "" where it is not."""
    for tensor in tree_leaves(inputs):
        if isinstance(tensor, Tensor):
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                return "within a torch.func transform"
            if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
                return "within forward-mode AD"
            if tensor.is_complex():
                return "for complex numbers"
    return ""
