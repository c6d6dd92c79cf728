"""A copy of a model, and how it is run."""

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from freezekit._inputs import Arguments, tensors_in
from freezekit._twin.constants import Constants
from freezekit._twin.copies import Copies
from freezekit._twin.higher_order import CannotWatch, Refusing
from freezekit._twin.roots import has_data, roots_of
from freezekit._twin.surroundings import Surroundings
from freezekit._twin.switches import random_numbers_kept, switches_kept, uncompiled
from freezekit._twin.untouched import Untouched

Result = TypeVar("Result")
_RUN_LATER = (GeneratorType, CoroutineType, AsyncGeneratorType, map, filter, zip)


class Twin:
    """A callable and its arguments, copied with every module and tensor that they reach.

    Args:
        function: a module; a method of one, or of an object that has some, such as ``model.decode``; a function that
            runs modules that it names, or that objects, lists and dictionaries hold that it names; or a
            `functools.partial` of these.
        inputs: its arguments. Tensors on the meta device stand for tensors on the model's device.
        data: whether the copies hold data.

    Attributes:
        function, inputs: the copies.
        has_data: whether they hold data.
        has_device: whether any of the model is on a device other than the meta device.
        roots: the copied modules that ``function`` runs, by the names it has for them; the name is "" where
            ``function`` is a module or a module's method.
        strangers: modules that are not copied: copied ones reach them only by names of their source code.

    Raises:
        TypeError: as `roots_of`; or something in ``function`` cannot be copied.
        ValueError: as `roots_of`; or data is wanted, and there is none.
    """

    def __init__(self, function: Callable[..., Any], inputs: Arguments, *, data: bool) -> None:
        originals = roots_of(function)
        tensors = [t for module in originals.values() for t in (*module.parameters(), *module.buffers())]
        for name, module in ((name, m) for root in originals.values() for name, m in root.named_modules()):
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"model must be of modules whose calls can be seen, got a ScriptModule ({name!r}):\n"
                    f"put the module that it was scripted or traced from in its place"
                )
        if data and not has_data(originals, inputs):
            raise ValueError("model and inputs must hold data to be run on it, got a tensor on the meta device")
        self._devices = {t.device for t in tensors if not t.is_meta}
        self.has_data, self.has_device = data, bool(self._devices)
        self._fake = None if data else FakeTensorMode(allow_non_fake_inputs=True)
        self._constants = None if self._fake is None else Constants(self._fake)
        self._untouched = Untouched() if data else None
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._originals = {module for root in originals.values() for module in root.modules()}
        self._surroundings = Surroundings([function, *originals.values()], data=data)
        self.strangers = [module for module in self._surroundings.modules if module not in self._originals]
        self._copies = copies = Copies(self._stand_in)
        with copies, torch.inference_mode(False):
            for module in originals.values():
                copies.add(module)
            self.roots = {name: copies.of(module) for name, module in originals.items()}
            self.function = copies.of(function)
            self.inputs = Arguments(*copies.of(tuple(inputs)))
            copies.finish()
        self._keep_from_being_leaves(inputs)
        for name, module in self.named_modules():
            if module in self._originals:
                raise TypeError(
                    f"{type(module).__name__} ({name}) is run on a copy, and is its own copy by __deepcopy__"
                )
        for _, module in self.named_modules():
            module.__dict__.pop("_compiled_call_impl", None)  # what Module.compile leaves; the class has None

    def _keep_from_being_leaves(self, inputs: Arguments) -> None:
        """Makes the copies of computed inputs computed too: a leaf that needs a gradient refuses writes in place."""
        root = torch.zeros((), requires_grad=True)
        with torch.inference_mode(False), torch.enable_grad():
            for original, copied in zip(tensors_in(tuple(inputs)), tensors_in(tuple(self.inputs))):
                if not original.is_leaf and copied.is_leaf:
                    _Computed.apply(root, copied.requires_grad_(False))

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

    def held(self) -> Iterator[Tensor]:
        """What the copied modules hold: these, and tensors in other attributes."""
        attributes = [vars(module) for _, module in self.named_modules()]
        return (value for value in tree_leaves(attributes) if isinstance(value, Tensor))

    def run(self) -> Any:
        """Calls the copy, within `undisturbed`.

        Raises:
            TypeError: the call only makes a generator or a coroutine.
        """
        with self._untouched or nullcontext():
            result = self.inputs.call(self.function)
        if isinstance(result, _RUN_LATER):
            getattr(result, "close", lambda: None)()  # a coroutine warns otherwise
            raise TypeError(
                f"model must do its work when it is called, got a {type(result).__name__}, whose body runs later: let "
                "a function run it, such as lambda x: list(model(x))"
            )
        return result

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Runs the copies within it; the random state, torch's switches and all that they changed are restored."""
        with ExitStack() as stack:
            stack.enter_context(random_numbers_kept(self._devices))
            stack.callback(self._surroundings.put_back)
            if self._untouched is not None:
                stack.callback(self._untouched.put_back)
            stack.enter_context(switches_kept())
            stack.enter_context(self._copies.named())
            stack.enter_context(uncompiled())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(Refusing())
            for mode in (self._fake, self._constants):  # set where the twin has no data
                stack.enter_context(mode or nullcontext())
            yield

    def settle(self) -> None:
        """Gives data to what outlives the run, once the graph is gone: see `Constants`."""
        if self._constants is not None:
            with random_numbers_kept(self._devices):
                self._constants.settle(set(map(id, self.held())))

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """The copy of one tensor."""
        source = tensor if tensor.is_leaf else tensor.detach()
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        plain = plain and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        if self._fake is None and plain:
            # What views share is copied once: they stay views of each other.
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = storage.clone()
            made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            made.set_(self._storages[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())
            made = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        elif self._fake is None:
            made = copy.deepcopy(source) if isinstance(source, nn.Parameter) else source.detach().clone()
        elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
            raise NotImplementedError(f"a {kind} tensor has no known size without data")
        elif tensor.is_meta:
            device = next(iter(self._devices), torch.device("cpu"))
            key, form = tensor.untyped_storage()._cdata, (tensor.shape, tensor.stride())
            with self._fake:
                made = torch.empty_strided(*form, dtype=tensor.dtype, device=device)
                made = made.set_(self._storages.setdefault(key, made.untyped_storage()), 0, *form)
            made = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        else:
            made = self._fake.from_tensor(source, static_shapes=True)
        if self._fake is not None and plain and not is_functorch_wrapped_tensor(tensor):
            # Torch makes what the elements of a computed view span, and no more.
            storage, size = made.untyped_storage(), tensor.untyped_storage().nbytes()
            if storage.nbytes() < size:
                storage.resize_(size)
        return made.requires_grad_(tensor.requires_grad)


@contextmanager
def all_kept(values: Iterable[Any], devices: Iterable[torch.device]) -> Iterator[None]:
    """Context manager: what a run within it changes of all that ``values`` reach, and of any tensor, is put back."""
    surroundings, untouched = Surroundings(values, data=False), Untouched()
    with ExitStack() as stack:
        stack.enter_context(random_numbers_kept(devices))
        stack.callback(surroundings.put_back)
        stack.callback(untouched.put_back)
        stack.enter_context(switches_kept())
        stack.enter_context(uncompiled())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(untouched)
        yield


class _Computed(torch.autograd.Function):
    """Gives a tensor a node, in place."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, tensor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of torch's own classes, or stands in for one in a twin without data."""
    kind = type(tensor)
    return kind is Tensor or kind is nn.Parameter or kind.__module__ == "torch._subclasses.fake_tensor"


def on_twin(
    function: Callable[..., Any], inputs: Arguments, act: Callable[[Twin], Result], data: bool | None = None
) -> Result:
    """The result of ``act`` on a twin without data or, where that fails and there is data, on one with data.

    Args:
        data: True or False to try only one of the two.

    Raises:
        RuntimeError: if the twin's run fails, with torch's own reason; if it needs data and has none.
        ValueError: if ``data`` is True and there is none.
    """
    if not data:
        twin = None
        try:
            twin = Twin(function, inputs, data=False)
            return act(twin)
        except Exception as error:  # whatever a model raises where it needs values
            whole = _whole_step(error)
            traceback.clear_frames(error.__traceback__)  # the frames hold its graph
            if isinstance(error, CannotWatch):
                raise _failed(function, error, whole) from error
            if data is False or not has_data(roots_of(function), inputs):
                raise _without_data(function, error, whole) from error
        finally:
            if twin is not None:
                twin.settle()
    try:
        return act(Twin(function, inputs, data=True))
    except Exception as error:
        if (whole := _whole_step(error)) or isinstance(error, RuntimeError):
            raise _failed(function, error, whole) from error
        raise


def _failed(function: Callable[..., Any], error: Exception, whole: str) -> RuntimeError:
    return RuntimeError(f"running a copy of {_name(function)} on these inputs fails: {error}{whole}")


def _without_data(function: Callable[..., Any], error: Exception, whole: str) -> Exception:
    """The error for a failed run without data: the original one where the caller's arguments are wrong."""
    if isinstance(error, TypeError | ValueError):
        return error
    needs = (
        ". If it needs the values of tensors, have a copy of it run on data: give model and inputs that hold some, and "
        "not measure=False"
    )
    told = str(error).removesuffix(".") or type(error).__name__
    return RuntimeError(f"{_name(function)} was run on tensors without data, where it fails: {told}{whole or needs}")


def _whole_step(error: Exception) -> str:
    """What to do about an error of a backward pass or of an optimizer that a function runs; "" for any other error."""
    folder = Path(torch.__file__).parent
    places = {(frame.f_code.co_filename, frame.f_code.co_name) for frame, _ in traceback.walk_tb(error.__traceback__)}
    stepping = (folder / "optim", folder / "amp" / "grad_scaler.py")
    if any(Path(file).is_relative_to(place) for file, _ in places for place in stepping):
        what = "It is a whole training step: its gradients are those of a copy, which its optimizer does not have"
    elif (torch.autograd.__file__, "backward") in places:
        what = "It calls backward() itself, which fails where nothing learns, as where a plan freezes all of it"
    else:
        return ""
    return f"\n{what}. Give what computes the loss alone, such as lambda x: loss(model(x))"


def _name(function: Any) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__qualname__", "it")
