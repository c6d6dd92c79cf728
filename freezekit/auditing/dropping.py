"""Which calls drop at random while a model runs, and between which parameters: as the tensors tell that pass there."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from freezekit._inputs import tensors_in

from .tensors import drops

_ELEMENTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


@dataclass(frozen=True)
class _History:
    """Where a tensor comes from.

    frozen: whether the last parameters on its way are; None without any. is_weight: whether it is made of parameters
    alone. dropped_by: ids of the modules that dropped some of it since those parameters.
    """

    frozen: bool | None = None
    is_weight: bool = False
    dropped_by: frozenset[int] = frozenset()


class Dropping(TorchFunctionMode):
    """Notes who drops at random, and who of these does between frozen parameters.

    Attributes:
        called: modules that called a function which drops.
        between: those, or modules that drop, whose input comes from frozen parameters and whose output goes to some.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.called: list[nn.Module] = []
        self.between: list[nn.Module] = []
        self._known: dict[int, nn.Module] = {}
        self._histories = WeakIdKeyDictionary()

    def watch(self, module: nn.Module) -> None:
        self._known[id(module)] = module
        module.register_forward_pre_hook(lambda module, _: self.running.append(module))
        module.register_forward_hook(self._leave, with_kwargs=True)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.running.pop()
        if drops(module):
            self._drop(module, (args, kwargs), output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self._together(tensors_in((args, kwargs)))
        result = func(*args, **kwargs)
        if before is not None:
            self._note(result, before)
        if self.running and _drops_now(func, args, kwargs):
            self.called.append(self.running[-1])
            self._drop(self.running[-1], (args, kwargs), result)
        return result

    def _together(self, given: list[Tensor]) -> _History | None:
        """The history of what a function makes of tensors; of those that meet parameters this is noted."""
        pairs = [(t, self._history_of(t)) for t in given]
        weights = [history for _, history in pairs if history.is_weight]
        data = [history for _, history in pairs if not history.is_weight]
        if not data:
            return _joined(weights) if weights else None
        if not weights:
            return _joined(data)
        frozen = all(history.frozen for history in weights)
        if frozen:
            self.between += [self._known[key] for history in data for key in history.dropped_by]
        return _History(frozen)

    def _history_of(self, tensor: Tensor) -> _History:
        if isinstance(tensor, nn.Parameter):
            return _History(not tensor.requires_grad, is_weight=True)
        return self._histories.get(tensor, _History())

    def _note(self, result: Any, history: _History) -> None:
        for tensor in tensors_in(result):
            if not isinstance(tensor, nn.Parameter):
                self._histories[tensor] = history

    def _drop(self, module: nn.Module, given: Any, result: Any) -> None:
        come_from = [self._history_of(t) for t in tensors_in(given)]
        if not any(history.frozen for history in come_from) or any(history.frozen is False for history in come_from):
            return
        for tensor in tensors_in(result):
            history = self._history_of(tensor)
            self._histories[tensor] = _History(True, history.is_weight, history.dropped_by | {id(module)})


def _joined(histories: list[_History]) -> _History:
    """Of several: frozen unless any learns, which ends what was dropped before."""
    known = [history.frozen for history in histories if history.frozen is not None]
    frozen = all(known) if known else None
    dropped = frozenset[int]().union(*(history.dropped_by for history in histories)) if frozen else frozenset[int]()
    return _History(frozen, all(history.is_weight for history in histories), dropped)


def _drops_now(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    if func is F.scaled_dot_product_attention:  # has no signature that can be read
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if func not in _ELEMENTS:
        return False
    given = signature(func).bind(*args, **kwargs)
    given.apply_defaults()
    return bool(given.arguments["training"] and given.arguments["p"])
