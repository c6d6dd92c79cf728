"""Calls of functions in a model's forward that keep more than freezekit's, seen while it runs.

`convert` swaps layers; a call such as ``F.relu(x)`` is in the forward itself and has to be replaced there. Calls
are seen by a `TorchFunctionMode`; those that a layer of torch.nn makes in its own forward are that layer's matter.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from freezekit import _C, functional
from freezekit._inputs import Arguments
from freezekit._storages import storages_of
from freezekit._twin import Twin, on_twin
from freezekit.enabling import enabled, watched

_C_NN = torch._C._nn
# Code whose calls are not the reader's to replace: whatever is installed, torch's and freezekit's.
INSTALLED = tuple({sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")})
_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).resolve().parents[1]), *INSTALLED)


def _table() -> dict[Callable[..., Any], tuple[str, str]]:
    """function -> (how it is written, the function of freezekit that keeps less)."""
    found: dict[Callable[..., Any], tuple[str, str]] = {}
    places = (("F", F), ("torch", torch), ("Tensor", Tensor))
    for name in functional.__all__:
        for spelling in (name, f"{name}_"):
            for prefix, place in places:
                if hasattr(place, spelling):
                    found.setdefault(getattr(place, spelling), (f"{prefix}.{spelling}", name))
    for name in ("max_pool1d", "max_pool2d", "max_pool3d"):
        found[getattr(F, f"{name}_with_indices")] = (f"F.{name}", name)
    for name in ("avg_pool2d", "avg_pool3d"):
        found.setdefault(getattr(_C_NN, name), (f"F.{name}", name))
    return found


_FUNCTIONS = _table()


@dataclass
class FunctionCall:
    """Calls of one function from one line, in the forward of one module.

    module: the module's name; function: as it is written; where: "file:line"; instead: what keeps less; count: calls in
    one forward; bytes_kept: what autograd kept for them, parameters and buffers aside; bytes_needed: what it keeps of
    them with freezekit enabled.
    """

    module: str
    function: str
    where: str
    instead: str
    count: int = 0
    bytes_kept: int = 0
    bytes_needed: int = 0


@dataclass
class _Seen(TorchFunctionMode):
    calls: dict[tuple[str, str, str], FunctionCall] = field(default_factory=dict)
    modules: list[str] = field(default_factory=lambda: [""])
    own: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = _FUNCTIONS.get(func) if callable(func) and func.__hash__ else None
        frame = _caller(sys._getframe(1)) if known else None
        if not known or not frame:
            return func(*args, **(kwargs or {}))
        result, kept = self._kept_by(func, args, kwargs or {})
        if kept:
            # A call in place is made again on a copy.
            again = (result.clone(), *args[1:]) if args and result is args[0] else args
            with enabled():
                _, needed = self._kept_by(func, again, kwargs or {})
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            key = (self.modules[-1], known[0], where)
            call = self.calls.setdefault(key, FunctionCall(*key, instead=f"freezekit.functional.{known[1]}"))
            call.count += 1
            call.bytes_kept += kept
            call.bytes_needed += needed
        return result

    def _kept_by(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> tuple[Any, int]:
        """The call's result, and the bytes that autograd keeps for it."""
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not _C.chains.is_for_recipe():
                storages.update((s._cdata, s) for s in storages_of(tensor) if s._cdata not in self.own)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = func(*args, **kwargs)
        return result, sum(storage.nbytes() for storage in storages.values())


def _caller(frame: FrameType | None) -> FrameType | None:
    """The frame that wrote the call; None where that is torch's or freezekit's own code, beyond the function itself."""
    functional = F.__file__
    while frame is not None and (
        frame.f_code.co_filename == functional
        or "torch/overrides" in frame.f_code.co_filename
        or frame.f_code.co_filename.endswith("torch/_jit_internal.py")
    ):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(_OWN):
        return None
    return frame


def functional_calls(model: nn.Module, inputs: Arguments) -> list[FunctionCall]:
    """The calls that keep more than freezekit's would, in the order of the first ones.

    A copy of `model` runs once, in its present mode and with gradients. Calls in installed packages are left out: they
    cannot be replaced.

    Args:
        model: any module.
        inputs: of its forward.
    """

    def run(twin: Twin) -> _Seen:
        seen = _Seen()
        seen.own = {storage._cdata for t in twin.tensors() for storage in storages_of(t)}
        for name, module in twin.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: seen.modules.append(name))
            module.register_forward_hook(lambda *_: seen.modules.pop() and None, always_call=True)
        with twin.undisturbed(), torch.enable_grad(), watched(), seen:
            twin.run()
        return seen

    calls = on_twin(model, inputs, run).calls.values()
    return [call for call in calls if call.bytes_needed < call.bytes_kept]
