"""One forward pass without data: which layer computes what, and what autograd would keep of it.

It runs on the meta device, with stand-ins for parameters and buffers, so that it costs no memory, changes no running
statistics and draws no random numbers; the shapes, and so the bytes, are those of a real pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import conv_flop_count, flop_registry

FREEZEKIT_CONV = torch.ops.freezekit.conv2d


@dataclass
class Call:
    """One layer's computation, or one function's that a module with children calls in its own forward.

    Attributes:
        name: the module's name; "" is the model itself.
        layer: its class.
        function: what its own forward calls, for modules that have children; "" for a layer.
        inputs, outputs: shapes of the first tensor in and out.
        flops: multiplications and additions of the forward pass.
        moved: bytes of all tensors that the operators read and wrote.
        input_needs_grad, output_needs_grad: what autograd sees.
    """

    name: str
    layer: str
    function: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    flops: int = 0
    moved: int = 0
    input_needs_grad: bool = False
    output_needs_grad: bool = False
    module: nn.Module | None = field(default=None, repr=False)


@dataclass
class Kept:
    """One storage that autograd keeps for backward: its bytes, and the calls that hold it, first one first."""

    nbytes: int
    holders: list[int] = field(default_factory=list)


@dataclass
class Trace:
    """All calls of a forward pass in order, and all that is kept; parameters and buffers are not counted."""

    calls: list[Call]
    kept: list[Kept]

    @property
    def bytes_kept(self) -> int:
        return sum(kept.nbytes for kept in self.kept)


def trace(model: nn.Module, inputs: Any) -> Trace:
    """Runs `model(*inputs)` on meta tensors, in the mode (train or eval) that it is in.

    Args:
        model: any module whose forward does not depend on the values of tensors.
        inputs: a tensor, a sequence of positional arguments, or a mapping of keyword arguments; their device and
            values do not matter, their `requires_grad` does.

    Raises:
        RuntimeError: if the forward pass needs values (`.item()`, data-dependent shapes), with torch's own reason.
    """
    recorder = _Recorder(model)
    stand_ins = recorder.stand_ins()
    args, kwargs = arguments(tree_map(_stand_in, inputs))
    with recorder.recording(), torch.enable_grad():
        try:
            output = torch.func.functional_call(model, stand_ins, args, kwargs, tie_weights=True)
        except (RuntimeError, NotImplementedError) as error:
            raise RuntimeError(
                f"{type(model).__name__} cannot run without data, which explaining it needs: {error}"
            ) from error
    del output  # held until here, so that everything kept for its backward was counted
    return Trace(recorder.calls, list(recorder.kept.values()))


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's positional and keyword arguments: a mapping holds the latter, a sequence the former."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        return (inputs,), {}
    return tuple(inputs), {}


def _stand_in(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    stand_in = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return stand_in.requires_grad_(value.requires_grad)


class _Functions(TorchFunctionMode):
    """Keeps the name of the torch function that is running, outermost first."""

    def __init__(self, recorder: _Recorder) -> None:
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


class _Operators(TorchDispatchMode):
    """Adds up what the operators compute and move, for the call that is running."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        call = self.recorder.current()
        if call is None:
            return result
        packet = func.overloadpacket
        if packet in flop_registry:
            call.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif packet is FREEZEKIT_CONV:
            call.flops += conv_flop_count(args[0].shape, args[1].shape, result.shape, transposed=False)
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            call.moved += sum(t.numel() * t.element_size() for t in tensors)
        return result


def _note(call: Call, arguments: Any, result: Any) -> None:
    """Shapes and needs of the first tensors in and out; in-place ones by what they were on the way in."""
    if tensors := [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]:
        call.inputs = tuple(tensors[0].shape)
        call.input_needs_grad = any(t.requires_grad for t in tensors)
    if tensors := [t for t in tree_leaves(result) if isinstance(t, Tensor)]:
        call.outputs = tuple(tensors[0].shape)
        call.output_needs_grad = any(t.requires_grad for t in tensors)


class _Recorder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.calls: list[Call] = []
        self.kept: dict[int, Kept] = {}
        self._index: dict[tuple[int, str, int], int] = {}
        self._active: list[tuple[nn.Module, int]] = []
        self._entries = 0
        self._not_counted: set[int] = set()
        self._alive: list[Any] = []
        self._functions = _Functions(self)

    def stand_ins(self) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            stand_in = torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
            self._not_counted.add(stand_in.untyped_storage()._cdata)
            made[name] = stand_in
        return made

    def current(self) -> Call | None:
        index = self._current_index()
        return None if index is None else self.calls[index]

    def _current_index(self) -> int | None:
        """The running call: a layer, or a function that a module with children calls itself."""
        if not self._active:
            return None
        module, entry = self._active[-1]
        function = ""
        if next(module.children(), None) is not None:
            if not self._functions.stack:
                return None
            function = self._functions.stack[0]
        key = (id(module), function, entry)
        if key not in self._index:
            self._index[key] = len(self.calls)
            name = self.names.get(id(module), "?")
            self.calls.append(Call(name, type(module).__name__, function, module=module))
        return self._index[key]

    def note_function(self, arguments: Any, result: Any) -> None:
        """Shapes of a function that computed something; property reads and the like have no call of their own."""
        module = self._active[-1][0] if self._active else None
        if module is None or next(module.children(), None) is None:
            return
        index = self._index.get((id(module), self._functions.stack[0], self._active[-1][1]))
        if index is not None:
            _note(self.calls[index], arguments, result)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entries += 1
        self._active.append((module, self._entries))
        if next(module.children(), None) is None and (call := self.current()):
            _note(call, (args, kwargs), None)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if next(module.children(), None) is None and (call := self.current()):
            _note(call, None, output)
        self._active.pop()

    def _pack(self, tensor: Tensor) -> Tensor:
        index, storage = self._current_index(), tensor.untyped_storage()
        key = storage._cdata
        if index is not None and key not in self._not_counted:
            if key not in self.kept:
                self.kept[key] = Kept(storage.nbytes())
                self._alive.append(storage)  # so that no other storage takes its address
            if index not in self.kept[key].holders:
                self.kept[key].holders.append(index)
        return tensor

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.model.modules():
                # prepend: a user's hook that calls modules is then seen inside its own module.
                before = module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
                after = module.register_forward_hook(self._leave)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
            stack.enter_context(self._functions)
            stack.enter_context(_Operators(self))
            yield
