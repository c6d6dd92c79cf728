"""What listens while a model runs: the functions that it calls, and the operators that these run."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from freezekit._inputs import tensors_in
from freezekit._twin import CannotWatch, call_higher_order, is_higher_order
from freezekit.explanation import larger, layouts
from freezekit.explanation.record import Call
from freezekit.fusion.classes import plan_of
from freezekit.fusion.layers import why_unfused
from freezekit.fusion.report import block_layers

_BLOCKS = (torch.ops.freezekit.frozen_conv2d.default, torch.ops.freezekit.frozen_conv2d_shared.default)


class FusedBlocks:
    """The blocks of models that would run fused in a call made now.

    A hook on a layer makes its block run layer by layer, and a trace watches layers by hooks. It must not change what
    it looks at: layers of such blocks get none, and their operator is told by the block's name.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.labels: dict[int, list[str]] = {}
        self.unwatched: set[int] = set()
        for module in (part for model in models for part in model.modules()):
            plan = plan_of(module)
            if plan is None or "forward" in module.__dict__ or id(module) in self.unwatched:
                continue
            # A hook on a sequence that the plan looks into would change what runs.
            self.unwatched |= {id(module.get_submodule(path)) for path in plan.sequences}
            for names in plan.blocks:
                layers = block_layers(module, names)
                if layers is not None and not why_unfused(*layers):
                    parts = (names.conv, names.norm, "add" if names.adds else "", names.activation)
                    self.labels.setdefault(id(module), []).append("fused " + " + ".join(filter(None, parts)))
                    self.unwatched |= {id(layer) for layer in layers if isinstance(layer, nn.Module)}

    def label_of(self, module: nn.Module | None, number: int) -> str:
        """What the `number`-th fused operator in a module's forward stands for; "" for a module without any."""
        labels = self.labels.get(id(module))
        return labels[min(max(number, 1), len(labels)) - 1] if labels else ""


# Their results include a workspace, which backward reads and whose size is known to the library alone.
OPAQUE = (torch.ops.aten.mkldnn_rnn_layer, torch.ops.aten._cudnn_rnn, torch.ops.aten.miopen_rnn)


class Listener(Protocol):
    """Is told what runs; see `freezekit.explanation.trace`."""

    has_data: bool

    def current(self) -> Call | None: ...
    def note_function(self, arguments: Any, result: Any) -> None: ...
    def start_block(self) -> None: ...


class Functions(TorchFunctionMode):
    """Knows the torch function that the model called, without those that it calls in turn."""

    def __init__(self, recorder: Listener) -> None:
        super().__init__()
        self.recorder = recorder
        self.outermost: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.outermost is not None:
            return func(*args, **(kwargs or {}))
        self.outermost = getattr(func, "__name__", str(func))
        if func in (torch.ctc_loss, torch.nn.functional.ctc_loss):
            args, kwargs = _with_lengths_as_numbers(args, kwargs or {})
        try:
            result = func(*args, **(kwargs or {}))
            if func in (torch.max_pool1d, torch.nn.functional.max_pool1d) and not result.requires_grad:
                # On a CPU torch has a kernel for this, which it does not take where a mode looks on.
                result = result.clone(memory_format=torch.contiguous_format)
            self.recorder.note_function((args, kwargs), result)
            return result
        finally:
            self.outermost = None


def _with_lengths_as_numbers(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a call of ctc_loss as torch reads them on a CPU, but not where a mode looks on."""

    def number(value: Any) -> Any:
        return value.tolist() if isinstance(value, Tensor) and value.device.type == "cpu" else value

    lengths = {key: number(value) for key, value in kwargs.items() if key in ("input_lengths", "target_lengths")}
    return (*args[:2], *map(number, args[2:4]), *args[4:]), {**kwargs, **lengths}


class Operators(TorchDispatchMode):
    """Adds up what the operators compute and move, for the call that is running."""

    supports_higher_order_operators = True

    def __init__(self, recorder: Listener) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_higher_order(func):
            return call_higher_order(self, func, args, kwargs, has_data=self.recorder.has_data)
        kind, block = func.overloadpacket, func in _BLOCKS
        if kind in OPAQUE and not self.recorder.has_data:
            raise NotImplementedError(f"what {func} keeps is known to its library alone, when it runs")
        if block:
            self.recorder.start_block()
        nested = any(isinstance(t, Tensor) and t.is_nested for t in tree_leaves((args, kwargs)))
        if nested and types:  # a class of Python's, whose own operators run on what it wraps
            return NotImplemented
        # Torch computes those of the older layout in kernels of their own.
        if kind not in flop_registry and not nested and _is_composed(func):  # which reaches a mode where no autograd is
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if not self.recorder.has_data:
            if kind is torch.ops.aten.native_batch_norm:
                result = _with_mixed_statistics(args, result)
            result = layouts.lay_out(func, args, kwargs, result)
            larger.store(kind, args, result)
        call = self.recorder.current()
        if call is None:
            return result
        if block:
            note(call, args, result)
            call.output_needs_grad = call.input_needs_grad  # Here, below autograd, the result does not know yet.
        if kind in flop_registry:
            call.flops += flop_registry[kind](*args, **kwargs, out_val=result)
        if not func.is_view and func.namespace != "prim":  # Those ask a tensor what it is.
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            call.moved += sum(t.numel() * t.element_size() for t in tensors)
        return result


def _is_composed(func: Any) -> bool:
    """Whether an operator is no more than calls of others; what asks a tensor for its shape or device is none."""
    gives_tensors = any(isinstance(result.type, torch.TensorType) for result in func._schema.returns)
    has_own = DispatchKey.CompositeImplicitAutograd in func.py_kernels  # a formula of torch's, for its tracers
    return gives_tensors and not has_own and bool(func._can_decompose())


def _with_mixed_statistics(args: Any, result: Any) -> Any:
    """A batch norm's result as a CPU gives it: statistics are as wide as the parameters, of a narrow input too.

    Without data torch gives them the input's dtype.
    """
    x, *parameters = (t for t in args if isinstance(t, Tensor))
    if x.device.type != "cpu" or not parameters or parameters[0].dtype == x.dtype:
        return result
    return (result[0], *(statistic.to(parameters[0].dtype) for statistic in result[1:]))


def note(call: Call, arguments: Any, result: Any) -> None:
    """Shapes and needs of the first tensors in and out; in-place ones by what they were on the way in."""
    if tensors := tensors_in(arguments):
        call.inputs = _shape(call, tensors[0])
        call.channels_last = suggest_memory_format(tensors[0]) == torch.channels_last
        call.input_needs_grad = any(map(_needs_grad, tensors))
    if tensors := tensors_in(result):
        call.outputs = _shape(call, tensors[0])
        call.output_needs_grad = any(map(_needs_grad, tensors))


def _shape(call: Call, tensor: Tensor) -> tuple[int | str, ...]:
    """The size that is another for each part of a nested tensor is a name."""
    if tensor.is_nested and tensor.layout is torch.strided:
        raise CannotWatch(
            f"{call.name or call.layer} takes or gives a nested tensor of the layout torch.strided, which tells no "
            "shape; make it with layout=torch.jagged"
        )
    return tuple(size if type(size) is int else str(size) for size in tensor.shape)


def _needs_grad(tensor: Tensor) -> bool:
    """Whether a tensor needs a gradient; within a torch.func transform, whether the tensor that it wraps does."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def fallback(inputs: Any) -> str:
    """Why a layer of freezekit's is torch's own in this call, and keeps what torch keeps; "" where it is not."""
    for tensor in tensors_in(inputs):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return "within a torch.func transform"
        if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            return "within forward-mode AD"
        if tensor.is_complex():
            return "for complex numbers"
    return ""
