"""A convolution's weight and bias with the batch norm behind it folded in, made once while nothing of it changes.

With s = gamma / sqrt(var + eps):  w' = w * s,  b' = beta + (b - mean) * s.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import freezekit._C as _C
from freezekit import backends
from freezekit.constants import declare_constant, register_cache
from freezekit.fusion.layers import sources


@dataclass(frozen=True)
class Folded:
    """weight: as the convolution's, in its dtype and layout; bias: (K,), or None where nothing adds one.

    The bias of a folded batch norm is float32 beside a shorter weight: as a constant of every position of a channel,
    its rounding would not average out.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Entry:
    """What was folded; `sources` tells whether the tensors that it was made of are as they were."""

    norm: weakref.ref[nn.Module] | None
    eps: float
    sources: Any
    by: str
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
        return _fold(conv, norm, torch.promote_types(conv.weight.dtype, torch.float32))
    entry, by = _entries.get(conv), _folded_by(conv.weight)
    now = sources(conv, norm)
    if entry is not None and entry.by == by and _fits(entry, norm, now):
        return entry.folded
    cacheable = not any(source.is_inference() for source in now)
    # A tensor made in inference mode could not be saved for a backward pass.
    with torch.inference_mode(False), torch.no_grad():
        stamp = _C.blocks.Stamp(now) if cacheable else None
        result = _make(conv, norm, by)
    if cacheable:
        declare_constant(result.weight)
        if result.bias is not None:
            declare_constant(result.bias)
        reference = None if norm is None else weakref.ref(norm)
        with _lock:
            _entries[conv] = _Entry(reference, _eps(norm), stamp, by, result)
    return result


def is_kept(conv: nn.Module) -> bool:
    """Whether something is kept of a convolution."""
    return conv in _entries


def drop(conv: nn.Module) -> None:
    """Forgets what was made of a convolution: it is trainable now, or was written to unseen."""
    if conv in _entries:
        _C.blocks.forget(id(conv))
        with _lock:
            _entries.pop(conv, None)


def drop_all(model: nn.Module | Tensor) -> None:
    """Forgets what was made of a model's convolutions, or of one tensor."""
    for conv, _ in entries_of(model):
        drop(conv)


def verify(model: nn.Module | Tensor) -> None:
    """Folds again and compares.

    Raises:
        RuntimeError: if what is kept differs from what folding gives now.
    """
    for conv, entry in entries_of(model):
        norm = None if entry.norm is None else entry.norm()
        if not _fits(entry, norm, sources(conv, norm)):
            continue  # seen, and made again at the next call
        with torch.no_grad():
            now = _make(conv, norm, entry.by)
        kept = entry.folded
        if not torch.equal(kept.weight, now.weight) or (
            kept.bias is not None and now.bias is not None and not torch.equal(kept.bias, now.bias)
        ):
            raise RuntimeError(
                f"the kept folded weight of {conv} is stale: it or its batch norm was written to through .data or "
                "numpy; call freezekit.constants.invalidate(model) after such a write"
            )


def kept(model: nn.Module) -> Iterator[Folded]:
    """What is kept for a model's convolutions at this moment."""
    for _, entry in entries_of(model):
        yield entry.folded


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within the block a model may run on other tensors; what was kept of its own is there again after it."""
    before = entries_of(model)
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


def entries_of(model: nn.Module | Tensor) -> list[tuple[nn.Conv2d, _Entry]]:
    """What is kept of a model's convolutions, or of one tensor."""
    with _lock:
        entries = list(_entries.items())
    if isinstance(model, Tensor):
        found = [(c, e) for c, e in entries if any(source is model for source in _sources_of(c, e))]
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
    return entry.sources.matches(now)


def _sources_of(conv: nn.Module, entry: _Entry) -> list[Tensor]:
    return sources(conv, None if entry.norm is None else entry.norm())


def _folded_by(weight: Tensor) -> str:
    """The backend whose kernels fold: one launch, and a weight in the layout that they read. "aten" elsewhere."""
    own = {"native": "cuda", "emulated": "cpu"}.get(backends._current)
    return backends._current if own is not None and weight.device.type == own else "aten"


def _make(conv: nn.Conv2d, norm: nn.Module | None, by: str) -> Folded:
    if norm is None or by == "aten":
        return _fold(conv, norm, _exact(conv.weight))
    affine = norm._parameters["weight"], norm._parameters["bias"]
    statistics = norm._buffers["running_mean"], norm._buffers["running_var"]
    return Folded(*_C.blocks.fold(conv.weight, conv.bias, *statistics, *affine, _eps(norm), by))


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
