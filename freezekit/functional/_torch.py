"""Which calls freezekit's functions leave to torch's own: where nothing is kept, and where arguments are unusual."""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from freezekit import _C, backends

SizeN = int | Sequence[int]
Function = TypeVar("Function", bound=Callable[..., Any])

# The operators take plain arguments. Whatever else an argument is, the call is torch's own, which knows more kinds of
# numbers and whose exceptions are those that users expect.
LEFT_TO_TORCH: Any = None


def as_torch(
    stock: Callable[..., Any], quick: Callable[..., Any] | None = None, *, shortcut: bool = True
) -> Callable[[Function], Function]:
    """Decorates a stand-in for `stock`, a function of the same arguments, of which the first is the input.

    `quick`, of `_C.quick`, is asked first: it answers a call of plain arguments, and says None of others.

    Where no gradient is needed nothing is kept, and torch's own function is the shortest way; without `shortcut` the
    stand-in runs there too, for what it refuses and torch would take. Tensors with a `__torch_function__` are asked
    first, as torch's functions ask them. A trace, and an export without gradients or to ONNX, records torch's operator.
    So do calls for which the stand-in returns `LEFT_TO_TORCH`, unless kernels are demanded that it has.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            # torch.compile cannot look into quick.
            if quick and not kwargs and not is_dynamo_compiling():
                result = quick(*args)
                if result is not None:
                    return result
            # Subclasses and fx's proxies must see the stand-in; a trace compares lines too, and always takes one way.
            free = shortcut and backends._current in ("auto", "aten") and args and type(args[0]) is Tensor
            if free and not _learns(args) and not (kwargs and _learns(kwargs.values())) and jit_trace() is None:
                return stock(*args, **kwargs)
            given = (*args, *kwargs.values())
            if has_torch_function(given):
                if function.__name__.startswith("conv"):
                    tell_quantizer(given[0])
                return handle_torch_function(stand_in, given, *args, **kwargs)
            if backends._current in ("auto", "aten") and records_as_torch(*given):
                return stock(*args, **kwargs)
            result = function(*args, **kwargs)
            if result is not LEFT_TO_TORCH:
                return result
            if backends.demands_kernels() and function.__name__ not in backends.WITHOUT_KERNELS:
                _C.refuse(function.__name__, backends._current, "torch's own function alone takes such arguments")
            return stock(*args, **kwargs)

        return cast(Function, stand_in)

    return decorate


jit_trace = torch._C._get_tracing_state  # a name that torch.compile knows


def records_as_torch(*arguments: Any) -> bool:
    """Whether a call goes into an archive that loads without freezekit: a trace, or an export that needs no gradient.

    `torch.jit.trace` traces twice, the second time without gradients, and wants the same graph. ONNX has no gradients,
    whatever the parameters say.
    """
    exports = torch.compiler.is_exporting() and (torch.onnx.is_in_onnx_export() or not _learns(arguments))
    return exports or jit_trace() is not None


def _learns(arguments: Iterable[Any]) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.requires_grad:
            return torch.is_grad_enabled()
    return False


def tell_quantizer(input: Any) -> None:
    """Warns where torch.ao.quantization traces a convolution or a norm of freezekit's, which it does not know."""
    if type(getattr(input, "tracer", None)).__module__.startswith("torch.ao."):
        warnings.warn(
            "torch.ao.quantization leaves convolutions and norms of freezekit's in float: call "
            "freezekit.revert(model) before prepare, and freezekit.enable() in place of convert. "
            "Where the model itself calls freezekit.functional, write torch.nn.functional",
            stacklevel=2,
        )


def are_tensors(*values: object) -> bool:
    """Whether each is a tensor, or None."""
    return all(value is None or isinstance(value, Tensor) for value in values)


def are_numbers(*values: object) -> bool:
    """Whether each is a real number, to be taken for a float."""
    return all(isinstance(value, (float, int, torch.SymFloat, Real)) for value in values)


def is_integer(value: object) -> bool:
    """Whether it is one integer; numpy's are, tensors are left to torch."""
    return isinstance(value, int) or (hasattr(value, "__index__") and not isinstance(value, Tensor))


def padded_to_same(input: Tensor, spans: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Padding that keeps sizes where a kernel reaches over `spans` elements more than one.

    An odd span needs one element more at the end, which is put there in a copy of `input`.
    """
    if any(span % 2 for span in spans):
        input = F.pad(input, [side for span in reversed(spans) for side in (0, span % 2)])
    return input, tuple(span // 2 for span in spans)


def sizes(value: object, axes: int) -> tuple[int, ...] | None:
    """One integer for each of `axes`, from one or as many; None where `value` does not give that."""
    if is_integer(value):
        return (cast(int, value),) * axes
    if not isinstance(value, tuple | list) or len(value) not in (1, axes) or not all(map(is_integer, value)):
        return None
    return tuple(value) * (axes // len(value))
