"""The dataflow of one module's own forward, with children as leaves, and what that dataflow depends on.

Only `nn.Sequential` is no leaf, and subclasses that run it as it is: it does nothing but call its children in order,
so that a convolution in one and an addition behind it are seen together.

torch.fx runs `forward` once with symbolic values. What the code decides by plain attributes (`self.training`,
`self.downsample is None`) or by the number of children is decided then, so it is recorded: a rewritten forward is good
only while it all still holds. What cannot be watched makes a forward untraceable: it sets attributes, reads mutable
ones, asks for the type of a value, makes tensors of its own, draws random numbers.
"""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.overrides import TorchFunctionMode

from freezekit.fusion.layers import has_global_hooks, is_watched

# Where a fused module's class keeps the class that it is made from.
ORIGINAL = "_freezekit_original"
# Attributes that nn.Module itself keeps: structure and hooks, watched elsewhere.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Untraceable(Exception):
    """A forward whose dataflow cannot be known, or not watched; the text says why."""


@dataclass
class Reads:
    """What a forward decided by.

    (path of the module, attribute) -> value; paths of the modules that it used; path -> number of children; path ->
    class and names of children of a sequence that was looked into.
    """

    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    children: dict[str, int] = field(default_factory=dict)
    sequences: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Traced:
    graph: fx.Graph
    reads: Reads


class _Value(fx.Proxy):
    """A symbolic value that will not be mistaken for something that is no tensor."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") in ("abc", "typing"):
            frame = frame.f_back
        name = str(frame.f_globals.get("__name__", ""))
        if name == "torch" or name.startswith(("torch.", "freezekit.fusion")):
            return type(self)
        raise Untraceable("its forward asks for the type of a value")


def _written_as_it_is(target: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


# Without these, Python takes `a += b` of symbolic values for `a = a + b`, and who else holds `a` would miss the change.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_Value, f"__{_name}__", _written_as_it_is(getattr(operator, _name)))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was fused."""
    return getattr(type(module), ORIGINAL, type(module))


def is_plain_sequence(module: nn.Module) -> bool:
    """Whether calling a module is calling its children one after the other, and nothing else."""
    kind = original_class(module)
    return (
        issubclass(kind, nn.Sequential)
        and kind.forward is nn.Sequential.forward
        and kind.__iter__ is nn.Sequential.__iter__
        and kind.__call__ is nn.Module.__call__
        and not is_watched(module)
        and getattr(module, "_compiled_call_impl", None) is None
        and not has_global_hooks()
    )


class _OneLevel(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, reads: Reads, sequences: dict[nn.Module, tuple[str, type[nn.Module]]]) -> None:
        super().__init__()
        self.reads, self.sequences = reads, sequences

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if m not in self.sequences or len(args) != 1 or kwargs:
            return super().call_module(m, forward, args, kwargs)
        path, kind = self.sequences[m]
        self.reads.sequences[path] = kind, tuple(m._modules)
        (value,) = args
        for child in m._modules.values():
            value = child(value)  # type: ignore[misc]
        return value

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


class _NoOwnTensors(TorchFunctionMode):
    """Refuses calls of torch that no symbolic value takes part in: their results would be frozen into the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(issubclass(t, fx.Proxy) for t in types):
            raise Untraceable(f"its forward calls {getattr(func, '__name__', func)} on no input")
        return func(*args, **(kwargs or {}))


def trace(module: nn.Module, kind: type[nn.Module]) -> Traced:
    """The dataflow of `kind.forward` on `module`.

    Raises:
        Untraceable: with the reason, and `reads` (what was read until then) as its attribute.
    """
    reads = Reads()
    state = random.getstate()
    sequences = _sequences(module)  # before recorders stand in for their classes
    try:
        with _recording(module, kind, reads), _NoOwnTensors():
            graph = _OneLevel(reads, sequences).trace(module)
    except Untraceable as error:
        raise _with_reads(error, reads) from None
    except Exception as error:  # whatever a forward does with a value that is none
        text = str(error).strip().splitlines()
        reason = Untraceable(f"torch.fx cannot trace it: {text[0] if text else type(error).__name__}")
        raise _with_reads(reason, reads) from None
    if random.getstate() != state:
        random.setstate(state)
        raise _with_reads(Untraceable("its forward draws random numbers"), reads)
    return Traced(graph, reads)


def _with_reads(error: Untraceable, reads: Reads) -> Untraceable:
    error.reads = reads  # type: ignore[attr-defined]
    return error


@contextmanager
def _recording(module: nn.Module, kind: type[nn.Module], reads: Reads) -> Iterator[None]:
    """Within, reads of plain attributes of the module and of its lists of modules are recorded."""
    watched = [(module, type(module), kind, "")]
    watched += [(child, type(child), original_class(child), path) for path, child in _lists(module, "")]
    try:
        for one, _, base, path in watched:
            one.__class__ = _recorder(base, path, reads)
        yield
    finally:
        for one, before, _, _ in watched:
            object.__setattr__(one, "__class__", before)  # past the recorder's own __setattr__


def _sequences(module: nn.Module) -> dict[nn.Module, tuple[str, type[nn.Module]]]:
    """Plain sequences below a module that only sequences and lists stand above, with their paths and classes."""
    found: dict[nn.Module, tuple[str, type[nn.Module]]] = {}
    stack = [("", module)]
    while stack:
        path, one = stack.pop()
        for name, child in one._modules.items():
            if child is None:
                continue
            if is_plain_sequence(child):
                found[child] = path + name, original_class(child)
                stack.append((f"{path}{name}.", child))
            elif original_class(child) in _CONTAINERS:
                stack.append((f"{path}{name}.", child))
    return found


def _lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():
        if child is not None and original_class(child) in _CONTAINERS:
            yield f"{prefix}{name}", child
            yield from _lists(child, f"{prefix}{name}.")


def _recorder(base: type[nn.Module], path: str, reads: Reads) -> type[nn.Module]:
    def note(self: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, _PLAIN):
            reads.attributes[path, name] = value
        elif name in self.__dict__ and not isinstance(value, (nn.Module, type)) and not callable(value):
            if not (isinstance(value, tuple) and all(isinstance(item, _PLAIN) for item in value)):
                raise Untraceable(f"its forward reads self.{name}, a {type(value).__name__} that may change unseen")
            reads.attributes[path, name] = value

    class Recorder(base):  # type: ignore[valid-type, misc]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "_modules":
                reads.children[path] = len(value)
            elif name not in _INTERNAL and not name.startswith("__"):
                note(self, name, value)
            return value

        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)
            if value is None:
                reads.attributes[path, name] = None
            elif isinstance(value, nn.Module):
                reads.modules.add(f"{path}.{name}" if path else name)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            raise Untraceable(f"its forward sets self.{name}")

    Recorder.__name__ = base.__name__
    return Recorder
