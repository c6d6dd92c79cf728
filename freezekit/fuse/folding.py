"""A convolution's weight and bias with the batch norm behind it folded in, made once while nothing of it changes.

With s = gamma / sqrt(var + eps):  w' = w * s,  b' = beta + (b - mean) * s.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from freezekit.constants import declare_constant, register_cache
from freezekit.fuse.layers import sources


@dataclass(frozen=True)
class Folded:
    """weight: as the convolution's, in its dtype and layout; bias: (K,), or None where nothing adds one.

    The bias of a folded batch norm is float32 beside a shorter weight: as a constant of every position of a channel,
    its rounding would not average out.
    """

    weight: Tensor
    bias: Tensor | None


class _State:
    """What a source was when it was read. The storage is held, so that no other can take its address."""

    __slots__ = ("address", "dtype", "held", "source", "stride", "version")

    def __init__(self, source: Tensor) -> None:
        self.source = weakref.ref(source)
        self.held = source.detach()
        self.address = source.data_ptr()
        self.version = source._version
        self.stride = source.stride()
        self.dtype = source.dtype

    def matches(self, source: Tensor) -> bool:
        return (
            self.source() is source
            and self.version == source._version
            and self.address == source.data_ptr()
            and self.dtype is source.dtype
            and self.stride == source.stride()
        )


@dataclass(frozen=True)
class _Entry:
    norm: weakref.ref[nn.Module] | None
    eps: float
    states: tuple[_State, ...]
    folded: Folded


# By convolution, and not on it: an attribute would be copied, pickled and shared with replicas.
_entries: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def folded(conv: nn.Conv2d, norm: nn.Module | None) -> Folded:
    """Weight and bias of a frozen convolution and a batch norm with fixed statistics, kept until one of them changes.

    A change is a new tensor, a new storage, or a version counted up: load_state_dict, copy_, optimizers, ``.to()``. A
    write through ``.data`` is none of these, see `invalidate`.
    """
    if torch.compiler.is_compiling():
        return _fold(conv, norm, torch.float32)
    entry = _entries.get(conv)
    now = sources(conv, norm)
    if entry is not None and _fits(entry, norm, now):
        return entry.folded
    cacheable = not any(source.is_inference() for source in now)
    # A tensor made in inference mode could not be saved for a backward pass.
    with torch.inference_mode(False), torch.no_grad():
        states = tuple(_State(source) for source in now) if cacheable else ()
        result = _fold(conv, norm, _exact(conv.weight))
    if cacheable:
        declare_constant(result.weight)
        if result.bias is not None:
            declare_constant(result.bias)
        reference = None if norm is None else weakref.ref(norm)
        with _lock:
            _entries[conv] = _Entry(reference, _eps(norm), states, result)
    return result


def drop(conv: nn.Module) -> None:
    """Forgets what was made of a convolution: it is trainable now, or was written to unseen."""
    if conv in _entries:
        with _lock:
            _entries.pop(conv, None)


def drop_all(model: nn.Module | Tensor) -> None:
    """Forgets what was made of a model's convolutions, or of one tensor."""
    for conv, _ in _of(model):
        drop(conv)


def verify(model: nn.Module | Tensor) -> None:
    """Folds again and compares.

    Raises:
        RuntimeError: if what is kept differs from what folding gives now.
    """
    for conv, entry in _of(model):
        norm = None if entry.norm is None else entry.norm()
        if not _fits(entry, norm, sources(conv, norm)):
            continue  # seen, and made again at the next call
        with torch.no_grad():
            now = _fold(conv, norm, _exact(conv.weight))
        kept = entry.folded
        if not torch.equal(kept.weight, now.weight) or (
            kept.bias is not None and now.bias is not None and not torch.equal(kept.bias, now.bias)
        ):
            raise RuntimeError(
                f"the kept folded weight of {conv} is stale: it or its batch norm was written to through .data or "
                "numpy; call freezekit.invalidate(model) after such a write"
            )


def kept(model: nn.Module) -> Iterator[Folded]:
    """What is kept for a model's convolutions at this moment."""
    for _, entry in _of(model):
        yield entry.folded


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within the block a model may run on other tensors; what was kept of its own is there again after it."""
    before = _of(model)
    try:
        yield
    finally:
        drop_all(model)
        with _lock:
            _entries.update(before)


class _Folds:
    """This cache as `freezekit.constants` sees it."""

    drop = staticmethod(drop_all)
    verify = staticmethod(verify)


register_cache(_Folds())


def _of(model: nn.Module | Tensor) -> list[tuple[nn.Conv2d, _Entry]]:
    with _lock:
        entries = list(_entries.items())
    if isinstance(model, Tensor):
        found = [(c, e) for c, e in entries if any(state.source() is model for state in e.states)]
    else:
        modules = set(model.modules())
        found = [(c, e) for c, e in entries if c in modules]
    return [(conv, entry) for conv, entry in found if isinstance(conv, nn.Conv2d)]


def _exact(weight: Tensor) -> torch.dtype:
    """In which folding is done: float64 where the device has it."""
    return torch.float64 if weight.device.type in ("cpu", "cuda") else torch.float32


def _eps(norm: nn.Module | None) -> float:
    return 0.0 if norm is None else float(norm.eps)  # type: ignore[arg-type]


def _fits(entry: _Entry, norm: nn.Module | None, now: list[Tensor]) -> bool:
    if (None if entry.norm is None else entry.norm()) is not norm or entry.eps != _eps(norm):
        return False
    if len(entry.states) != len(now):
        return False
    for state, source in zip(entry.states, now):  # noqa: SIM110, a generator costs as much as the comparisons
        if not state.matches(source):
            return False
    return True


def _fold(conv: nn.Conv2d, norm: nn.Module | None, exact: torch.dtype) -> Folded:
    weight, bias = conv.weight.detach(), conv.bias.detach() if conv.bias is not None else None
    if norm is None:
        return Folded(weight, bias)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.to(exact), norm.running_var.to(exact)
    scale = torch.rsqrt(var + norm.eps)
    if norm.affine:
        scale = scale * norm.weight.detach().to(exact)
    shift = (-mean if bias is None else bias.to(exact) - mean) * scale
    if norm.affine:
        shift = shift + norm.bias.detach().to(exact)
    scaled = weight.to(exact) * scale.view(-1, 1, 1, 1)
    shorter = weight.dtype in (torch.bfloat16, torch.float16)
    return Folded(scaled.to(weight.dtype), shift.to(torch.float32 if shorter else weight.dtype))
