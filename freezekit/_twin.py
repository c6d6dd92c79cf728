"""A copy of a model that is run instead of it: whatever its forward does, the model stays as it is.

Without data every tensor that is reached becomes a fake one, of the same shape, layout, dtype and device: operators
then only work out what they would return, and choose their kernels as on the real device. What cannot be reached, such
as a tensor in another library's cache, is made fake where it is used, and never written to. With data every tensor is
copied, which takes as much memory again as the model has.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from freezekit._inputs import Arguments

Result = TypeVar("Result")


class Twin:
    """A callable and its arguments, copied with every module and tensor that they reach.

    Args:
        function: a module; a method of one, or of an object that has some, such as ``model.decode``; a function that
            runs modules by names of its own; or a `functools.partial` of these.
        inputs: its arguments. Tensors on the meta device are taken for tensors on the model's.
        data: whether the copies hold data.

    Attributes:
        function, inputs: the copies.
        has_data: whether they hold data.
        has_device: whether the model is on a device: not, where all of it is on the meta device.
        roots: the copied modules that ``function`` runs, by the names it has for them; "" for the one of a module and
            of a module's method.

    Raises:
        TypeError: no module is found in ``function``, or something in it cannot be copied.
        ValueError: data is wanted, and there is none; or a lazy parameter has no shape yet.
    """

    def __init__(self, function: Callable[..., Any], inputs: Arguments, *, data: bool) -> None:
        originals = roots_of(function)
        tensors = [t for module in originals.values() for t in (*module.parameters(), *module.buffers())]
        if any(is_lazy(t) for t in tensors):
            raise ValueError("model has lazy parameters, whose shapes are not known before a first forward pass")
        if data and not has_data(originals, inputs):
            raise ValueError("model and inputs must hold data to be run on it, got a tensor on the meta device")
        self._devices = {t.device for t in tensors if not t.is_meta}
        self.has_data, self.has_device = data, bool(self._devices)
        self._fake = None if data else _fake_mode()
        copies = _Copies(self._stand_in)
        with copies:
            for module in originals.values():
                copies.add(module)
            self.roots = {name: copies.of(module) for name, module in originals.items()}
            self.function = copies.of(function)
            self.inputs = Arguments(*copies.of(tuple(inputs)))
            copies.finish()
        for _, module in self.named_modules():
            module.__dict__.pop("_compiled_call_impl", None)  # what Module.compile leaves; the class has None

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and copied module, each module once."""
        seen: set[nn.Module] = set()
        for prefix, root in self.roots.items():
            yield from root.named_modules(seen, prefix)

    def tensors(self) -> Iterator[Tensor]:
        """The copied parameters and buffers."""
        for root in self.roots.values():
            yield from root.parameters()
            yield from root.buffers()

    def run(self) -> Any:
        """Calls the copy; to be done within `undisturbed`."""
        return self.inputs.call(self.function)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within it the copies can be run; random numbers that they draw are drawn again by others."""
        devices = sorted({device.index or 0 for device in self._devices if device.type == "cuda"})
        state = random.getstate()
        try:
            with torch.random.fork_rng(devices), self._fake or nullcontext():
                yield
        finally:
            random.setstate(state)

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """The copy of one tensor."""
        source = tensor if tensor.is_leaf else tensor.detach()
        if self._fake is None:
            made = copy.deepcopy(source) if isinstance(source, nn.Parameter) else source.detach().clone()
        elif tensor.is_meta:
            device = next(iter(self._devices), torch.device("cpu"))
            with self._fake:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            made = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        else:
            made = self._fake.from_tensor(source, static_shapes=True)
        return made.requires_grad_(tensor.requires_grad)


def roots_of(function: Any) -> dict[str, nn.Module]:
    """The modules that a callable runs, by the names it has for them; see `Twin`.

    Raises:
        TypeError: there are none.

    >>> vae = nn.Sequential(nn.Linear(2, 2))
    >>> list(roots_of(lambda x: vae(x).sin())), list(roots_of(vae.forward))
    (['vae'], [''])
    """
    while isinstance(function, partial):
        function = function.func
    owner = function.__self__ if isinstance(function, MethodType) else function
    if isinstance(owner, nn.Module):
        return {"": owner}
    known = _names(owner) if isinstance(owner, FunctionType) else getattr(owner, "__dict__", {})
    found = {name: value for name, value in known.items() if isinstance(value, nn.Module)}
    if not (found and callable(function)):
        raise TypeError(
            "model must be an nn.Module, or a callable that runs one, such as model.decode, got "
            f"{type(function).__name__}"
        )
    return found


def _names(function: FunctionType) -> dict[str, Any]:
    """What the names of a function refer to, outside of it."""
    code = function.__code__
    known = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    cells = zip(code.co_freevars, function.__closure__ or ())
    return {**known, **{name: cell.cell_contents for name, cell in cells if _is_filled(cell)}}


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a variable that has no value yet
        return False


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of torch's own classes, or stands in for one in a twin without data."""
    kind = type(tensor)
    return kind is Tensor or kind is nn.Parameter or kind.__module__ == "torch._subclasses.fake_tensor"


def has_data(roots: dict[str, nn.Module], inputs: Arguments) -> bool:
    """Whether no tensor of the modules and inputs is on the meta device."""
    tensors = [t for root in roots.values() for t in (*root.parameters(), *root.buffers())]
    return not any(isinstance(t, Tensor) and t.is_meta for t in (*tensors, *tree_leaves(tuple(inputs))))


def on_twin(
    function: Callable[..., Any], inputs: Arguments, act: Callable[[Twin], Result], data: bool | None = None
) -> Result:
    """What ``act`` makes of a twin: of one without data or, where that fails and there is data, of one with data.

    Args:
        data: True or False for one of the two alone.

    Raises:
        RuntimeError: if the twin's run fails, with torch's own reason; if it needs data and has none.
        ValueError: if ``data`` is True and there is none.
    """
    if not data:
        try:
            return act(Twin(function, inputs, data=False))
        except Exception as error:  # whatever a model raises that misses the values of its tensors
            if data is False or not has_data(roots_of(function), inputs):
                raise _without_data(function, error) from error
    try:
        return act(Twin(function, inputs, data=True))
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(f"running a copy of {_name(function)} on these inputs fails: {error}") from error


def _without_data(function: Callable[..., Any], error: Exception) -> Exception:
    """What to say of a run without data that failed; wrong arguments are the caller's own."""
    if isinstance(error, TypeError | ValueError):
        return error
    return RuntimeError(
        f"{_name(function)} was run on tensors without data, where it fails: {error}. If it needs the values of "
        "tensors, have a copy of it run on data: give model and inputs that hold some, and not measure=False"
    )


def _name(function: Any) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__qualname__", "it")


def _fake_mode() -> Any:
    # Here, since the import takes about a second.
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


# What a closure may hold that is copied with its function; anything else stays the same object.
_HOLDERS = (Tensor, nn.Module, dict, list, set, tuple, FunctionType, MethodType, partial)


class _Copies(TorchFunctionMode):
    """`copy.deepcopy` that makes stand-ins of tensors, and copies what functions hold in closures.

    To `copy` a function is a constant; but one that is a module's attribute, or a hook on it, often holds the module,
    or a list that it writes to.
    """

    def __init__(self, stand_in: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._stand_in = stand_in
        self._memo: dict[int, Any] = {}
        self._functions: list[tuple[FunctionType, FunctionType]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self.tensor(args[0])
        if func is Tensor.clone:  # how a parameter is copied
            return self._stand_in(args[0])
        return func(*args, **(kwargs or {}))

    def tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._memo:
            with torch._C.DisableTorchFunction():
                self._memo[id(tensor)] = self._stand_in(tensor)
        return self._memo[id(tensor)]

    def add(self, module: nn.Module) -> None:
        """Registers what `copy.deepcopy` would not take for what it is: parameters, and functions with closures."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.tensor(tensor)
        for part in module.modules():
            for value in vars(part).values():
                for one in value.values() if isinstance(value, dict) else (value,):
                    if isinstance(one, FunctionType) and one.__closure__:
                        self._function(one)

    def of(self, value: Any) -> Any:
        """The copy of anything."""
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, partial):
            return partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
        try:
            return copy.deepcopy(value, self._memo)
        except Exception as error:  # of any class that is reached
            raise TypeError(f"{type(value).__name__} is run on a copy, and cannot be copied: {error}") from error

    def finish(self) -> None:
        """Fills the closures, once all that they may hold is copied."""
        for old, new in self._functions:  # grows while it is gone through
            for source, target in zip(old.__closure__ or (), new.__closure__ or ()):
                if _is_filled(source):
                    held = source.cell_contents
                    target.cell_contents = self.of(held) if isinstance(held, _HOLDERS) else held

    def _function(self, function: FunctionType) -> FunctionType:
        if id(function) in self._memo:
            return self._memo[id(function)]
        code, known = function.__code__, function.__globals__
        modules = {name: known[name] for name in code.co_names if isinstance(known.get(name), nn.Module)}
        if modules:
            known = {**known, **{name: self.of(module) for name, module in modules.items()}}
        cells = tuple(CellType() for _ in code.co_freevars)
        made = FunctionType(code, known, function.__name__, function.__defaults__, cells)
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(vars(function))
        self._memo[id(function)] = made
        self._functions.append((function, made))
        return made
