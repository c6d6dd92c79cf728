"""Saves memory without changing the model: freezekit's kernels on torch's own operators, process-wide or in a block."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from typing import Any, TypeVar

import torch
from torch._C import DispatchKey
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import config as compiler

from freezekit import _C
from freezekit._arguments import shown

Function = TypeVar("Function", bound=Callable[..., Any])

_TAG = "+freezekit"
_BITS = {None: 0, "int8": 8, "int4": 4}
_AUTOGRAD = (DispatchKey.AutogradCPU, DispatchKey.AutogradCUDA, DispatchKey.AutogradMeta)

_lock = threading.RLock()
# A child forked while another thread holds the lock would wait for ever.
if hasattr(os, "register_at_fork"):  # a system that has fork
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
# For each enable() and each block that is on: the block, and the precision asked for. The last entry counts.
_asked: list[tuple[enabled | None, str | None]] = []
_warned: set[str] = set()
_watching = threading.local()


def enable(precision: str | None = None) -> None:
    """From here on, torch's own operators keep for backward only what the requested gradients read, process-wide.

    The model stays as it is: classes, names, pickles and graphs are torch's. Every call in which freezekit
    saves nothing goes to torch's kernel as before. The switch holds in all threads of the process. Each `enable` needs
    a `disable`; calls may be nested. A backward pass needs no switch, unless a checkpoint recomputes its forward.

    Args:
        precision: None, the default, gives stock's gradients. "int8" and "int4" are lossy: SiLU, GELU, Mish, Hardswish,
            Softplus and ELU on a CPU, in float32, bfloat16 and float16, keep their derivative in 8 or 4 bits where no
            other tensor serves and their input would be kept. Results stay stock's. Element by element, a gradient
            through one differs from stock's by a bounded multiple of the incoming one, 0.0025 for GELU and "int8",
            0.046 for "int4": the table in docs/enable.md has all bounds. It has no derivative itself:
            such a backward pass under ``create_graph`` raises NotImplementedError. Where calls are nested, the last one
            that is still on counts, for the whole process.

    Raises:
        TypeError, ValueError: if `precision` is none of these.

    Warns:
        UserWarning: once for each operator that another library has overridden: its kernels stay in place there.

    >>> import torch, freezekit as fk
    >>> fk.enable()
    >>> fk.is_enabled()
    True
    >>> fk.disable()
    """
    _enable(None, precision)


def disable() -> None:
    """Ends one `enable`; with the last, torch's operators are what they were.

    Raises:
        RuntimeError: if freezekit is not enabled.
    """
    _disable(None)


def is_enabled() -> bool:
    """Whether freezekit's kernels stand in for torch's own operators.

    >>> import freezekit as fk
    >>> with fk.enabled():
    ...     fk.is_enabled()
    True
    """
    return bool(_asked)


def precision() -> str | None:
    """What derivatives of activations are kept in: None, which is exact, "int8" or "int4".

    >>> from freezekit.enabling import enabled, precision
    >>> with enabled("int8"):
    ...     precision()
    'int8'
    """
    asked = _asked[-1:]
    return asked[0][1] if asked else None


def _check_precision(precision: object) -> None:
    if precision is not None and not isinstance(precision, str):
        raise TypeError(f"precision must be None, 'int8' or 'int4', got {shown(precision)}")
    if precision not in _BITS:
        raise ValueError(f"precision must be None, 'int8' or 'int4', got {shown(precision)}")


def _enable(owner: enabled | None, precision: str | None) -> None:
    _check_precision(precision)
    with _lock:
        if not _asked:
            others = [name for name in _C.enable.on() if name not in _warned]
            _switched(True)
            try:
                _warn_of(others)
            except UserWarning:  # the user has made it an error
                _off()
                raise
        _asked.append((owner, precision))
        _C.enable.set_bits(_BITS[precision])


def _disable(owner: enabled | None) -> None:
    """Ends the owner's last call, or else the last of all: blocks of several threads may end in any order."""
    with _lock:
        if not _asked:
            raise RuntimeError("freezekit is not enabled: disable() needs an enable() before it")
        owners = [entry[0] for entry in _asked]
        own = [i for i, other in enumerate(owners) if other is owner]
        del _asked[own[-1] if own else -1]
        _C.enable.set_bits(_BITS[precision()])
        if not _asked:
            _off()


class enabled(ContextDecorator):
    """`enable` for a block, or, as a decorator, for the calls of a function.

    Args:
        precision: as for :func:`enable`.

    Raises:
        TypeError, ValueError: as for :func:`enable`.
        TypeError: as a decorator of a class, or of a generator or coroutine function, whose body runs after the call
            has ended.

    >>> import torch, freezekit as fk
    >>> conv = torch.nn.Conv2d(3, 8, 3).requires_grad_(False)
    >>> x = torch.ones(1, 3, 8, 8, requires_grad=True)
    >>> with fk.enabled():
    ...     y = conv(x)
    >>> y.sum().backward()
    """

    def __init__(self, precision: str | None = None) -> None:
        _check_precision(precision)
        self.precision = precision

    def __enter__(self) -> enabled:
        _enable(self, self.precision)
        return self

    def __exit__(self, *error: object) -> None:
        _disable(self)

    def __call__(self, function: Function) -> Function:
        if isinstance(function, type) or not callable(function):
            raise TypeError(f"enabled() decorates functions, got {shown(function)}")
        runs_later = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        body: Any = function
        while isinstance(body, (functools.partial, functools._lru_cache_wrapper, staticmethod)):
            body = body.func if isinstance(body, functools.partial) else body.__wrapped__
        if any(kind(called) for kind in runs_later for called in (body, type(body).__call__)):
            raise TypeError(f"enabled() decorates functions, got the generator or coroutine {body!r}")
        return super().__call__(function)


@contextmanager
def watched() -> Iterator[None]:
    """Keeps operators on under freezekit's own dispatch modes. Any other mode sees the operators that torch calls."""
    _C.enable.set_watched(True)
    _watching.on = True
    try:
        yield
    finally:
        _watching.on = False
        _C.enable.set_watched(False)


def as_given(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that a chain computed again. Compiled autograd traces this call."""
    return tensor


def _is_compiled(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for another one while torch.compile, or freezekit, traces.

    An export is a trace too, but of torch's own operators.
    """
    if getattr(_watching, "on", False):
        return type(tensor) is FakeTensor
    if TracingContext.try_get() is None or torch.compiler.is_exporting():
        return False
    return type(tensor) is FakeTensor or type(tensor) is FunctionalTensor


def _warn_of(others: list[str]) -> None:
    if not others:
        return
    warnings.warn(
        f"another library has overridden {', '.join(others)} of torch's operators: its kernels stay in place, and "
        "freezekit saves nothing there",
        stacklevel=4,
    )
    _warned.update(others)


def _off() -> None:
    _C.enable.off()
    _switched(False)


def _switched(on: bool) -> None:
    """Drops what torch has cached about the operators' kernels, as torch.library does when it registers one.

    Where torch has a kernel in Python for its tracers, that one stays first: a registration in C++ on the same key
    would hide it. What is compiled while enabled is cached under a tag, so that no process without freezekit finds it.
    """
    for name in _C.enable.operators():
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        in_python = op.py_kernels.get(DispatchKey.Autograd)
        for key in _AUTOGRAD if in_python else ():
            if on:
                op.py_kernels[key] = in_python
            else:
                del op.py_kernels[key]
        op._dispatch_cache.clear()
    if on:
        type(compiler).cache_key_tag = property(_tagged)  # type: ignore[attr-defined]
    else:
        del type(compiler).cache_key_tag  # type: ignore[attr-defined]


def _tagged(config: Any) -> str:
    """The tag of the cache's keys: the user's, which each thread has its own, and freezekit's behind it."""
    return config.__getattr__("cache_key_tag") + _TAG


_C.enable.set_is_compiled(_is_compiled)
