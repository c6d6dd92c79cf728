"""What of a model is freezekit's, what `convert` would swap, and what it leaves alone, and why."""

import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from freezekit import _C, functional
from freezekit._arguments import check_module
from freezekit._inputs import Arguments, arguments
from freezekit._storages import Packed, storages_of
from freezekit._twin import Twin, on_twin
from freezekit.conversion.swap import SWAPS, reason_to_leave, stock_base
from freezekit.enabling import enabled, watched
from freezekit.fusion.identity import classes_read

_ENABLE = "freezekit.enable() reaches the operators that it calls"
# Layers that call operators of those kinds.
_CALLING = (nn.modules.pooling._LPPoolNd, nn.LocalResponseNorm)
# Layers whose gradient is dy or nothing, but for a factor.
_MASKING = (nn.Softshrink, nn.Hardshrink, nn.Hardsigmoid)
_INDEXED = (nn.modules.pooling._AdaptiveMaxPoolNd, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


@dataclass(frozen=True)
class LayerReport:
    """One layer of a conversion report, or one call of a function in a forward.

    Attributes:
        name: the layer's name in the model, or the module whose forward makes the call; "" is the model itself.
        layer: its class's name; of a call, the function as it is written.
        status: "freezekit" (is one of freezekit's), "stock" (`convert` would swap it), "left alone", or "call".
        reason: why a layer is left alone or keeps its input all the same, or what to call instead; "" otherwise.
        where: of a call, "file:line"; "" otherwise.
        bytes_kept: of a call, what autograd held for it at the end of this forward, parameters aside; None otherwise.
            What the forward's own hooks take in its place, as a checkpoint's do, is no more the call's, and not listed.
    """

    name: str
    layer: str
    status: str
    reason: str = ""
    where: str = field(default="", repr=False)
    bytes_kept: int | None = field(default=None, repr=False)


def conversion_report(model: nn.Module, inputs: Any = None) -> list[LayerReport]:
    """What of `model` is freezekit's, what `convert` would swap, and what it leaves alone, and why.

    Lists layers of the kinds that freezekit replaces, their subclasses, and other layers that do the same; a shared
    layer is listed once. Calls of functions cannot be swapped: with `inputs`, the model runs once and the report also
    names those of `torch.nn.functional` and the like that keep more than freezekit's would, with their place and what
    they kept.

    Args:
        model: any module.
        inputs: None, or the arguments of one forward: a tensor, a tuple or list of positional arguments, or a mapping
            of keyword arguments. A copy of the model runs it, in the model's present mode and with gradients recorded.

    >>> from torch import nn
    >>> import freezekit as fk
    >>> fk.conversion.conversion_report(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid()))
    [LayerReport(name='0', layer='Conv2d', status='stock', reason='')]
    """
    check_module(model)
    rows = []
    looked_at = classes_read(model)
    for name, module in model.named_modules():
        base = stock_base(module)
        layer = type(module).__name__
        if base is None:
            if reason := _reason_of_a_relative(module):
                rows.append(LayerReport(name, layer, "left alone", reason))
        elif isinstance(module, SWAPS[base]):
            rows.append(LayerReport(name, layer, "freezekit", _what_it_still_keeps(module)))
        elif reason := looked_at.get(id(module)) or reason_to_leave(module, base):
            rows.append(LayerReport(name, layer, "left alone", f"{reason}; {_ENABLE}"))
        else:
            rows.append(LayerReport(name, layer, "stock"))
    if inputs is not None:
        for call in functional_calls(model, arguments(inputs)):
            times = f" ({call.count} times)" if call.count > 1 else ""
            reason = f"a call{times} that convert cannot swap: write {call.instead}"
            rows.append(LayerReport(call.module, call.function, "call", reason, call.where, call.bytes_kept))
    return rows


def _reason_of_a_relative(module: nn.Module) -> str:
    """Why a layer like one of freezekit's is left alone, though it keeps more; "" for any other layer."""
    kind = f"freezekit has no layer for {type(module).__module__}.{type(module).__qualname__}"
    leaky_relu = isinstance(module, nn.RReLU) and not module.training
    if leaky_relu or isinstance(module, (nn.Threshold, nn.modules.batchnorm._NormBase, *_CALLING)):
        return f"{kind}; {_ENABLE}"
    if isinstance(module, _MASKING) or (isinstance(module, nn.AlphaDropout) and module.training):
        return f"{kind}: it keeps a tensor as large as its input, of which its gradient reads a bit per element"
    if isinstance(module, _INDEXED):
        return f"{kind}: it keeps its input and int64 indices, of which max pools over equal windows keep a byte"
    return ""


def _what_it_still_keeps(module: nn.Module) -> str:
    """Why a frozen layer keeps its input all the same: its formula reads it."""
    parameters = list(module.parameters(recurse=False))
    if isinstance(module, nn.PReLU) and module.weight.requires_grad:
        return "its slope learns: the gradient reads its input, which is kept"
    if any(p.requires_grad for p in parameters):
        return ""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        return "normalises by batch: its gradient reads its input, which is kept, frozen or not"
    own_statistics = isinstance(module, nn.modules.instancenorm._InstanceNorm) and (
        module.training or not module.track_running_stats
    )
    if own_statistics or isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return "normalises by its input: the gradient reads it, so it is kept, frozen or not"
    return ""


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
        found.setdefault(getattr(torch._C._nn, name), (f"F.{name}", name))
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
    """Calls that a forward makes itself; those that a layer of torch.nn makes in its own are that layer's matter."""

    calls: dict[tuple[str, str, str], FunctionCall] = field(default_factory=dict)
    modules: list[str] = field(default_factory=lambda: [""])
    own: set[int] = field(default_factory=set)
    found: list[tuple[FunctionCall, list[ref[Packed]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.hooks = _hooks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = _FUNCTIONS.get(func) if callable(func) and func.__hash__ else None
        frame = _caller(sys._getframe(1)) if known else None
        # Hooks that the forward has set itself take what would be kept, a checkpoint's to let go of it.
        if not known or not frame or _hooks() != self.hooks:
            return func(*args, **(kwargs or {}))
        result, kept, packed = self._kept_by(func, args, kwargs or {})
        if kept:
            # A call in place is made again on a copy.
            again = (result.clone(), *args[1:]) if args and result is args[0] else args
            with enabled():
                _, needed, _ = self._kept_by(func, again, kwargs or {})
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            instead = f"freezekit.functional.{known[1]}"
            call = FunctionCall(self.modules[-1], known[0], where, instead, 1, kept, needed)
            self.found.append((call, packed))
        return result

    def _kept_by(
        self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, int, list[ref[Packed]]]:
        """The call's result, the bytes that autograd keeps for it, and what tells for how long."""
        storages: dict[int, torch.UntypedStorage] = {}
        alive: list[ref[Packed]] = []

        def pack(tensor: Tensor) -> Packed:
            if not _C.chains.is_for_recipe():
                storages.update((s._cdata, s) for s in storages_of(tensor) if s._cdata not in self.own)
            packed = Packed(tensor)
            alive.append(ref(packed))
            return packed

        with saved_tensors_hooks(pack, lambda packed: packed.tensor):
            result = func(*args, **kwargs)
        return result, sum(storage.nbytes() for storage in storages.values()), alive

    def leave(self) -> None:
        """The innermost module's forward ends."""
        self.modules.pop()

    def settle(self) -> None:
        """Counts the calls whose graph is still held: that of what a forward detached, or only chose by, is gone."""
        for one, packed in self.found:
            if any(reference() is not None for reference in packed):
                call = self.calls.setdefault((one.module, one.function, one.where), one)
                if call is not one:
                    call.count += 1
                    call.bytes_kept += one.bytes_kept
                    call.bytes_needed += one.bytes_needed


def _hooks() -> object:
    """The innermost hooks on saved tensors, which alone see what autograd is to keep."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


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
    """

    def run(twin: Twin) -> _Seen:
        seen = _Seen()
        seen.own = {storage._cdata for t in twin.held() for storage in storages_of(t)}
        for name, module in twin.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: seen.modules.append(name))
            module.register_forward_hook(lambda *_: seen.leave(), always_call=True)
        with twin.undisturbed(), torch.enable_grad(), watched(), seen:
            output = twin.run()
        seen.settle()
        del output  # held until here, and with it what was kept for its backward
        return seen

    calls = on_twin(model, inputs, run).calls.values()
    return [call for call in calls if call.bytes_needed < call.bytes_kept]
