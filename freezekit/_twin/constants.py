"""Gives data to tensors that outlive a run without data, in a library's cache of grids by size, say."""

from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import getweakrefs

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from freezekit._twin.higher_order import call_higher_order, is_higher_order

_ATEN = torch.ops.aten
# These read only the shape, strides, type and device of their first tensor.
_BY_FORM = {
    *(_ATEN.new_empty, _ATEN.new_empty_strided, _ATEN.new_full, _ATEN.new_ones, _ATEN.new_zeros),
    *(_ATEN.empty_like, _ATEN.full_like, _ATEN.ones_like, _ATEN.zeros_like, _ATEN.rand_like, _ATEN.randn_like),
}


@dataclass(frozen=True)
class _Known:
    """A tensor that an earlier call made."""

    number: int


@dataclass(frozen=True)
class _Form:
    """A tensor of the twin that an operator reads no values of."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Call(NamedTuple):
    func: Any
    given: Any
    numbers: list[int]


class Constants(TorchDispatchMode):
    """Records how tensors without data were made, those that depend on a tensor of the twin aside.

    A forward may store such a tensor, of positions say, outside the twin: in a cache of `functools`, of a class or of a
    Python module. A real step would find it there and fail. So a tensor that outlives the run is given its data.
    Tensors with data that the run finds in such places are not written to.
    """

    supports_higher_order_operators = True

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._calls: list[_Call] = []
        self._storages: list[torch.UntypedStorage] = []  # by number of a tensor; kept, so that no address is reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if is_higher_order(func):
            return call_higher_order(self, func, *given, has_data=False)
        if func._schema.is_mutable:
            args, kwargs = given = tree_map_only(Tensor, self._without_data, given)
        # Without data nothing is drawn from a generator, and some operators refuse one.
        plain = {name: None if isinstance(value, torch.Generator) else value for name, value in given[1].items()}
        result = func(*args, **plain)
        by_form = func.overloadpacket in _BY_FORM and _has_no_data(args[0])
        read = [t for t in tree_leaves((args[by_form:], given[1])) if isinstance(t, Tensor)]
        if all(t in self._numbers for t in read if _has_no_data(t)):
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and _has_no_data(t)]
            if made:
                noted = tree_map_only(Tensor, self._note, given)
                self._calls.append(_Call(func, noted, list(map(self._number, made))))
        elif func._schema.is_mutable:  # with a tensor of the twin
            written = {t.untyped_storage()._cdata for t in read}
            for t in [t for t in self._numbers if t.untyped_storage()._cdata in written]:
                del self._numbers[t]
        return result

    def _without_data(self, tensor: Tensor) -> Tensor:
        # The mode itself would compute with tensors of one element, and write to them.
        return tensor if _has_no_data(tensor) else self._fake.from_tensor(tensor, static_shapes=True)

    def _note(self, tensor: Tensor) -> Any:
        if tensor in self._numbers:
            return _Known(self._numbers[tensor])
        if _has_no_data(tensor):
            return _Form(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)
        return tensor

    def _number(self, tensor: Tensor) -> int:
        if tensor not in self._numbers:
            self._numbers[tensor] = len(self._storages)
            self._storages.append(tensor.untyped_storage())
        return self._numbers[tensor]

    def _storage_of(self, number: int) -> int:
        return self._storages[number]._cdata

    def settle(self, own: set[int]) -> None:
        """Computes the tensors that are still alive once the run is over and its graph is gone.

        Args:
            own: ids of tensors that may stay without data.
        """
        left = sorted(((n, t) for t, n in self._numbers.items() if id(t) not in own), reverse=True)
        self._numbers.clear()  # tensors with weak references, as these and the mode's, cannot be swapped
        self._fake.fake_tensor_converter = None  # type: ignore[assignment]
        calls = self._needed({self._storage_of(number) for number, _ in left})
        values: dict[int, Tensor] = {}
        with torch._C._AutoDispatchBelowADInplaceOrView():
            for func, given, numbers in calls:
                args, kwargs = tree_map_only(_Known, lambda known: values[known.number], given)
                args, kwargs = tree_map_only(_Form, _blank, (args, kwargs))
                values.update(zip(numbers, (t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor))))
        while left:  # views before their bases
            number, tensor = left.pop(0)
            if tensor._use_count() == 1 and not getweakrefs(tensor):
                torch.utils.swap_tensors(tensor, values.pop(number))

    def _needed(self, storages: set[int]) -> list[_Call]:
        """The calls that made or wrote to these storages, and those that made what they read."""
        found: list[_Call] = []
        while self._calls:
            call = self._calls.pop()
            if any(self._storage_of(number) in storages for number in call.numbers):
                found.append(call)
                storages |= {self._storage_of(t.number) for t in tree_leaves(call.given) if isinstance(t, _Known)}
        return found[::-1]


def _has_no_data(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _blank(form: _Form) -> Tensor:
    return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=form.device)
