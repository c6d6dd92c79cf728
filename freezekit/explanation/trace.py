"""One forward pass without data: which layer computes what, and what autograd would keep of it.

It runs on the meta device, with stand-ins for parameters and buffers, so that it costs no memory, changes no running
statistics and draws no random numbers; the shapes, and so the bytes, are those of a real pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from freezekit._inputs import Arguments
from freezekit.conversion import SWAPS
from freezekit.explanation.fused import FusedBlocks
from freezekit.explanation.modes import Functions, Operators, fallback, note
from freezekit.explanation.record import Call, Kept, Trace

OURS = tuple(SWAPS.values())


def trace(model: nn.Module, inputs: Arguments) -> Trace:
    """Runs `model` on meta tensors, in the mode (train or eval) that it is in.

    Args:
        model: any module whose forward does not depend on the values of tensors.
        inputs: their device and values do not matter, their `requires_grad` does.

    Raises:
        RuntimeError: if the forward pass needs values (`.item()`, data-dependent shapes), with torch's own reason.
    """
    recorder = Recorder(model)
    stand_ins = recorder.stand_ins()
    args, kwargs = tree_map(_stand_in, inputs)
    with recorder.recording(), torch.enable_grad():
        try:
            output = torch.func.functional_call(model, stand_ins, args, kwargs, tie_weights=True)
        except (RuntimeError, NotImplementedError) as error:
            raise RuntimeError(
                f"explaining {type(model).__name__} runs it on tensors without data and looks at what is kept; "
                f"there it fails: {error}"
            ) from error
        del output  # held until here, so that everything kept for its backward was counted
        return Trace(recorder.calls, list(recorder.kept.values()))


def _stand_in(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    stand_in = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return stand_in.requires_grad_(value.requires_grad)


class Recorder:
    """Knows which call is running, and adds up what the modes and hooks see of it."""

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
        self._functions = Functions(self)
        self._fused = FusedBlocks(model)
        self._blocks_run: Counter[int] = Counter()
        self.on_cpu = {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}

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
            stack = self._functions.stack
            block = self._fused.label_of(module, self._blocks_run[entry])
            if block and (not stack or stack[0].startswith("frozen_conv2d")):
                function = block
            elif not stack:
                return None
            else:
                function = stack[0]
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
            note(self.calls[index], arguments, result)

    def start_block(self) -> None:
        """A fused block's operator is called now; a module's blocks run in the order of its plan."""
        if self._active:
            self._blocks_run[self._active[-1][1]] += 1

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that a step on data does not make."""
        self._not_counted |= {tensor.untyped_storage()._cdata for tensor in tensors}
        self._alive += tensors

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entries += 1
        self._active.append((module, self._entries))
        if next(module.children(), None) is None and (call := self.current()):
            note(call, (args, kwargs), None)
            if isinstance(module, OURS):
                call.fallback = fallback((args, kwargs, *module.parameters(recurse=False)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if next(module.children(), None) is None and (call := self.current()):
            note(call, None, output)
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
                if id(module) in self._fused.unwatched:
                    continue
                # prepend: a user's hook that calls modules is then seen inside its own module.
                before = module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
                after = module.register_forward_hook(self._leave)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
            stack.enter_context(self._functions)
            stack.enter_context(Operators(self))
            yield
