"""torch's own samples of operators, laid out oddly: results have the strides and storages of those with data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from freezekit.explanation.modes import Operators
from tests.explanation.test_layouts import Silent

invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="needs expecttest")

# Importing it forbids to set torch.backends' flags in the whole process, which other tests do.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

# Torch writes outside of its tensors where statistics or pivots overlap.
CRASHES = {"lu_unpack", "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"}
KNOWN = {"aten.native_dropout_backward.default"}  # a backward pass's, which no explanation runs


def laid_out(t: Tensor, order: list[int], gap: int = 1) -> Tensor:
    """A copy whose dimensions are stored in an order, innermost first, with a gap behind each element."""
    strides, step = [0] * t.dim(), gap
    for dim in order:
        strides[dim], step = step, step * max(1, t.shape[dim]) * gap
    return torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)


def channels(t: Tensor) -> list[int]:
    return [1, *range(t.dim() - 1, 1, -1), 0] if t.dim() > 1 else list(range(t.dim()))


def one(t: Tensor, dim: int) -> Tensor:
    """The first along a dimension, whose stride nothing reads."""
    if t.dim() <= dim % max(t.dim(), 1):
        return t
    first = t.narrow(dim, 0, min(1, t.shape[dim]))
    return first.as_strided(first.shape, [7 if size == 1 else s for size, s in zip(first.shape, first.stride())])


def expanded(t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim, 0, 1).expand(t.shape) if t.dim() > 1 and t.shape[dim] else t


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "reversed": lambda t: laid_out(t, list(range(t.dim()))),
    "channels_last": lambda t: laid_out(t, channels(t)),
    "sliced": lambda t: laid_out(t, list(range(t.dim()))[::-1], 2),
    "sliced channels_last": lambda t: laid_out(t, channels(t), 2),
    "expanded": lambda t: expanded(t, 0),
    "last expanded": lambda t: expanded(t, -1),
    "one of the first": lambda t: one(t, 0),
    "one of the second": lambda t: one(t, 1),
    "one of the last, reversed": lambda t: one(laid_out(t, list(range(t.dim()))), -1),
}


class Comparing(TorchDispatchMode):
    """Runs each operator without data as well."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()
        self.operators: set[str] = set()
        self.wrong: dict[str, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        key = (func, *map(form, tree_leaves((args, kwargs))))
        plain = all(t.layout is torch.strided and not t.is_quantized for t in given)
        if key in self.seen or not plain or func._schema.is_mutable or func.is_view:
            return result
        self.seen.add(key)
        with suppress(DataDependentOutputException, DynamicOutputShapeException):
            told = without_data(func, args, kwargs)
            self.operators.add(str(func))
            storages = {t.untyped_storage()._cdata for t in given}
            for real, found in zip(tensors(result), tensors(told), strict=True):
                aliased = real.untyped_storage()._cdata in storages
                if real.numel() and (form(real, aliased) != form(found, aliased)):
                    self.wrong.setdefault(str(func), (key, form(real), form(found)))
        return result


def tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def form(value: Any, aliased: bool = False) -> Any:
    if not isinstance(value, Tensor):
        return repr(value)
    return value.shape, value.stride(), value.dtype, None if aliased else value.untyped_storage().nbytes()


def without_data(func: Any, args: Any, kwargs: Any) -> Any:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _disable_current_modes():
        args, kwargs = tree_map(
            lambda v: fake.from_tensor(v, static_shapes=True) if isinstance(v, Tensor) else v, (args, kwargs)
        )
        with fake, Operators(Silent()):
            return func(*args, **kwargs)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_every_operator_of_torchs_samples() -> None:
    seen = Comparing()
    for operator in invocations.op_db:
        if torch.float32 in operator.dtypes and operator.name not in CRASHES:
            with suppress(Exception):  # samples that torch skips on a CPU
                samples = list(itertools.islice(operator.sample_inputs("cpu", torch.float32), 40))
                for sample, laid in itertools.product(samples[:: max(1, len(samples) // 5)], FORMS.values()):
                    run(seen, operator, sample, laid)
    assert len(seen.operators) >= 400
    assert {name: found for name, found in seen.wrong.items() if name not in KNOWN} == {}


def run(seen: Comparing, operator: Any, sample: Any, laid: Callable[[Tensor], Tensor]) -> None:
    def given(value: Any) -> Any:
        return laid(value) if isinstance(value, Tensor) and value.layout is torch.strided else value

    with suppress(Exception):  # forms that an operator refuses
        args, kwargs = tree_map(given, ((sample.input, *sample.args), sample.kwargs))
        with seen:
            operator(*args, **kwargs)
