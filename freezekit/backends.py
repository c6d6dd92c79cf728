"""Which code computes the operators: ATen's libraries, freezekit's CUDA kernels, or those kernels emulated on a CPU."""

from __future__ import annotations

from types import TracebackType
from typing import Literal, get_args

from freezekit import _C
from freezekit._arguments import check_flag

Backend = Literal["auto", "native", "aten", "emulated"]

_current: Backend = "auto"
_hopper = False


def current_backend() -> Backend:
    """The backend that calls without a `backend` argument use.

    >>> current_backend()
    'auto'
    """
    return _current


def check_backend(name: str) -> None:
    """Raises ValueError unless `name` is a backend."""
    if name not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}, got {name!r}")


class backend:
    """Context manager: within it, freezekit's operators run on the named backend.

    As with `torch.backends` settings, it holds for the whole process, not for one thread. What a forward pass ran on,
    its backward pass runs on too.

    Args:
        name: ``"auto"`` lets freezekit choose; ``"native"`` demands its CUDA kernels (an error where none fits);
            ``"aten"`` demands cuDNN or oneDNN; ``"emulated"`` runs the CUDA kernels' source on CPU tensors, slowly,
            for tests.
        hopper: the kernels for sm_90a run where they can, on a GPU of sm_90 or emulated. They have never run on
            hardware, so they are asked for by name. Unlike the backend, this is looked at by each kernel's launch: a
            backward pass outside of the context runs the kernels of sm_80. ``"auto"`` never runs them.

    Raises:
        ValueError: if `name` is no backend, or `hopper` is set for one that has no such kernels.
        TypeError: if `hopper` is no bool.

    >>> import torch, freezekit as fk
    >>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    >>> with fk.backend("emulated"):
    ...     print(fk.functional.conv2d(x, w).item())
    9.0
    """

    def __init__(self, name: Backend, *, hopper: bool = False) -> None:
        check_backend(name)
        check_flag("hopper", hopper)
        if hopper and name not in ("native", "emulated"):
            raise ValueError(f"hopper=True needs backend 'native' or 'emulated', got {name!r}")
        self.name = name
        self.hopper = hopper
        self._outer: list[tuple[Backend, bool]] = []

    def __enter__(self) -> backend:
        self._outer.append((_current, _hopper))
        _set(self.name, self.hopper)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set(*self._outer.pop())


def _set(name: Backend, hopper: bool) -> None:
    global _current, _hopper
    _current, _hopper = name, hopper
    _C.set_hopper(hopper)
