"""One forward pass of a copy: which layer computes what, and what autograd keeps of it.

Without data where that tells, so that it costs no memory and any model can be traced; on data where it does not.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from freezekit import _C
from freezekit._inputs import Arguments
from freezekit._storages import Packed, storages_of
from freezekit._twin import Twin, on_twin
from freezekit.conversion import SWAPS
from freezekit.enabling import watched
from freezekit.explanation.modes import Functions, FusedBlocks, Operators, fallback, note
from freezekit.explanation.record import Call, Kept, Trace

OURS = tuple(SWAPS.values())


def trace(
    function: Callable[..., Any],
    inputs: Arguments,
    measure: bool | None = None,
    prepare: Callable[[str, nn.Module], object] = lambda name, module: None,
) -> Trace:
    """Runs a copy of ``function``, in the mode (train or eval) that its modules are in.

    Args:
        function: what `freezekit._twin.Twin` takes; not changed.
        inputs: its arguments; without data their values do not matter, their ``requires_grad`` does.
        measure: whether to run on data; None does so where it cannot be told without, and there is data.
        prepare: is called with name and module of each of the twin's roots before the run, to change it.

    Raises:
        RuntimeError, ValueError: as `freezekit._twin.on_twin`.
    """
    return on_twin(function, inputs, partial(_trace, prepare), measure)


def _trace(prepare: Callable[[str, nn.Module], object], twin: Twin) -> Trace:
    for name, root in twin.roots.items():
        prepare(name, root)
    recorder = Recorder(twin)
    with recorder.recording():
        output = twin.run()
    del output  # held until here, so that everything kept for its backward was counted
    modules = dict(twin.named_modules())
    return Trace(recorder.calls, list(recorder.kept.values()), modules, twin.has_data, twin.has_device)


class Recorder:
    """Knows which call of a twin is running, and adds up what the modes and hooks see of it."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin
        self.has_data = twin.has_data
        self.names = {id(module): name for name, module in twin.named_modules()}
        self.calls: list[Call] = []
        self.kept: dict[int, Kept] = {}
        self._index: dict[tuple[int, str, int], int] = {}
        # What is called outside of any forward counts as the module's whose method is explained, or as the function's.
        outside = not isinstance(twin.function, nn.Module)
        self._active: list[tuple[nn.Module | None, int]] = [(twin.roots.get(""), 0)] if outside else []
        self._entries = 0
        of_strangers = [tensor for module in twin.strangers for tensor in module.buffers(recurse=False)]
        there = [*twin.held(), *of_strangers]
        self._not_counted = {storage._cdata for tensor in there for storage in storages_of(tensor)}
        self._addresses: list[StorageWeakRef] = []
        self._packed: list[ref[Packed]] = []
        self._holds: list[tuple[Kept, int, ref[Packed]]] = []
        self._functions = Functions(self)
        self._fused = FusedBlocks(twin.roots.values())
        self._blocks_run: Counter[int] = Counter()

    def current(self) -> Call | None:
        index = self._current_index()
        return None if index is None else self.calls[index]

    def _current_index(self, otherwise: str | None = None) -> int | None:
        """The running call: a layer, or a function that a module with children calls itself; else `otherwise`."""
        if not self._active:
            return None
        module, entry = self._active[-1]
        function = ""
        if not _is_layer(module):
            running = self._functions.outermost
            block = self._fused.label_of(module, self._blocks_run[entry])
            if block and (running is None or running.startswith("frozen_conv2d")):
                function = block  # Called from Python or, where it was called alike before, from C++.
            elif (function := running or otherwise or "") == "":
                return None
        key = (id(module), function, entry)
        if key not in self._index:
            self._index[key] = len(self.calls)
            if module is None:
                self.calls.append(Call("", *_code_of(self.twin.function), function))
            else:
                kind, name = type(module), self.names.get(id(module), "?")
                self.calls.append(Call(name, kind.__name__, kind.__module__, function, module=module))
        return self._index[key]

    def note_function(self, arguments: Any, result: Any) -> None:
        """Shapes of a function that computed something; property reads and the like have no call of their own."""
        running = self._functions.outermost
        if not self._active or running is None or _is_layer(self._active[-1][0]):
            return
        module, entry = self._active[-1]
        index = self._index.get((id(module), running, entry))
        if index is not None:
            note(self.calls[index], arguments, result)

    def start_block(self) -> None:
        """A fused block's operator is called now; a module's blocks run in the order of its plan."""
        if self._active:
            self._blocks_run[self._active[-1][1]] += 1

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entries += 1
        self._active.append((module, self._entries))
        if _is_layer(module) and (call := self.current()):
            note(call, (args, kwargs), None)
            if isinstance(module, OURS):
                call.fallback = fallback((args, kwargs, *module.parameters(recurse=False)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if _is_layer(module) and (call := self.current()):
            note(call, None, output)
        self._active.pop()

    def _pack(self, tensor: Tensor) -> Packed:
        packed = Packed(tensor)
        self._packed.append(ref(packed))
        self._count(tensor, self._packed[-1])
        return packed

    def _count(self, tensor: Tensor, packed: ref[Packed]) -> None:
        # A parameter that the twin does not have is of a module made in the forward. What a node shows that it keeps no
        # more was packed before, and is gone.
        if isinstance(tensor, nn.Parameter) or _C.chains.is_let_go():
            return
        # An autograd function keeps its tensors once its forward is done, and is not a torch function itself.
        index = self._current_index("autograd function")
        if index is None:
            return
        for storage in storages_of(tensor):
            key = storage._cdata
            if key in self.kept and _C.chains.is_for_recipe():
                self.kept[key].chained.append(index)
            elif key not in self._not_counted:
                if key not in self.kept:
                    self.kept[key] = Kept(storage.nbytes(), lossy=_C.enable.is_lossy())
                    self._addresses.append(StorageWeakRef(storage))  # so that no other storage takes it
                self._holds.append((self.kept[key], index, packed))

    def _settle(self) -> None:
        """Counts what graphs hold now. Those of what a forward has detached, or only chose by, are gone."""
        for kept, index, packed in self._holds:
            if packed() is not None:
                kept.holds.append(index)
        self.kept = {key: kept for key, kept in self.kept.items() if kept.holds}

    def _let_go(self) -> None:
        """Frees what graphs keep: a copy may keep its graph."""
        for reference in self._packed:
            if packed := reference():
                packed.tensor = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for _, module in self.twin.named_modules():
                if id(module) not in self._fused.unwatched:
                    # prepend: a user's hook that calls modules is then seen inside its own module.
                    before = module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
                    after = module.register_forward_hook(self._leave)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            stack.enter_context(self.twin.undisturbed())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(self._pack, lambda packed: packed.tensor))
            stack.callback(self._let_go)
            stack.callback(self._settle)
            stack.enter_context(self._functions)
            stack.enter_context(Operators(self))
            stack.enter_context(watched())
            yield


def _is_layer(module: nn.Module | None) -> bool:
    """Whether this is a module without children, whose forward is one row."""
    return module is not None and next(module.children(), None) is None


def _code_of(function: Callable[..., Any]) -> tuple[str, str]:
    """What a function that is no module is called, and which Python module it is from."""
    while isinstance(function, partial):
        function = function.func
    kind = type(function)
    return getattr(function, "__name__", kind.__name__), getattr(function, "__module__", None) or ""
