"""Which code computes the operators: ATen's libraries, freezekit's CUDA kernels, or those kernels emulated on a CPU."""

from __future__ import annotations

from types import TracebackType
from typing import Literal, get_args

Backend = Literal["auto", "native", "aten", "emulated"]

_current: Backend = "auto"


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

    Raises:
        ValueError: if `name` is no backend.

    >>> import torch, freezekit as fk
    >>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    >>> with fk.backend("emulated"):
    ...     print(fk.conv2d(x, w).item())
    9.0
    """

    def __init__(self, name: Backend) -> None:
        check_backend(name)
        self.name = name
        self._outer: list[Backend] = []

    def __enter__(self) -> backend:
        global _current
        self._outer.append(_current)
        _current = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._outer.pop()
