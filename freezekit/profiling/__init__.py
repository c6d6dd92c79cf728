"""The kernel table of any code, with the phases of convolutions told apart, for freezekit's layers and stock ones."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler

from freezekit._showing import Shown
from freezekit.profiling.events import (
    MARK,
    PHASES,
    Event,
    outermost_operators,
    phases_of_kernel,
    phases_of_operator,
    read,
)
from freezekit.profiling.table import COLUMNS, KernelDiff, KernelRow, KernelTable, ProfileDiff, compare, tabulate

__all__ = ["COLUMNS", "PHASES", "KernelDiff", "KernelRow", "KernelTable", "ProfileDiff", "profile"]

_recording = threading.Lock()
_ONE = (
    "torch's profiler is recording already, and there is one for all threads of the process;\n"
    "let that block end first, or put one profile() around both. One that was entered by hand, as where an exception\n"
    "kept its end from running, ends by its __exit__(None, None, None)"
)
_LOST = (
    "another recording of torch's profiler began within this block, and took its events; it loses its own if it ends\n"
    "later: let one begin after the other has ended"
)


def _is_warming_up() -> bool:
    """Whether a recording has been prepared and not begun: torch has no other sign of it, and crashes at its start."""
    return any(
        issubclass(type(one), profiler.profile)
        and getattr(one, "entered", False)
        and getattr(one, "profiling_start_time_ns", None) == 0
        for one in gc.get_objects()
    )


class profile(Shown):
    """Context manager: records what runs within it; read the result after the block.

    On a GPU :meth:`kernels` lists kernels, copies and fills by their own names. On a CPU it lists operators: those that
    no other operator called, so that no time counts twice. After a name comes what it computes for a convolution;
    stock's `aten::convolution_backward` is told apart by the gradients that it was asked for.

    torch.profiler does the recording, with record_shapes on; recording costs some microseconds per operator, so compare
    times of small operators with care. GPU work that is still running at the end is waited for.

    There is one torch.profiler for all threads of a process: a second recording at the same time would lose the first
    one's events, or end the process. Entering the block is a RuntimeError then, and so is its end where another
    recording has ended within it. So is reading what a block has recorded before it has ended. One that warms up, as a
    ``torch.profiler.schedule`` asks, counts as recording; with ``acc_events=True`` only its first warm-up is seen.

    >>> import torch, freezekit as fk
    >>> from freezekit.profiling import profile
    >>> conv = fk.FreezableConv2d(3, 3, 3)
    >>> x = torch.randn(1, 3, 8, 8, requires_grad=True)
    >>> loss = conv(x).mean()
    >>> with profile() as before:
    ...     loss.backward()
    >>> before.counts()
    {'fprop': 0, 'dgrad': 1, 'wgrad': 1, 'db': 1, 'epilogue': 0}
    >>> loss = conv.requires_grad_(False)(x).mean()
    >>> with profile() as after:
    ...     loss.backward()
    >>> print(str(before.diff(after)).splitlines()[1])
    wgrad 1 -> 0
    """

    def __init__(self) -> None:
        self._is_open = False
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self._events: list[Event] | None = None

    def __enter__(self) -> profile:
        if self._events is not None:
            raise RuntimeError("this profile has recorded already: make a new profile() for every block")
        if not _recording.acquire(blocking=False):
            raise RuntimeError(_ONE)
        try:
            if profiler._is_profiler_enabled or _is_warming_up():  # by somebody else
                raise RuntimeError(_ONE)
            self._profiler.__enter__()
        except BaseException:
            _recording.release()
            raise
        self._is_open = True
        with profiler.record_function(MARK):
            pass
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._is_open:
            return
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found = None
            if profiler._is_profiler_enabled:  # to end once more what another thread has ended would crash the process
                self._profiler.__exit__(*error)
                found = read(self._profiler)
            if found is not None:
                self._events = found
            elif error[0] is None:
                raise RuntimeError(_LOST)
        finally:
            self._is_open = False
            _recording.release()

    def __del__(self) -> None:
        if "_is_open" in vars(self):  # not where __init__ had refused its arguments
            self.__exit__(GeneratorExit, None, None)

    def kernels(self) -> KernelTable:
        """The kernel table; print it."""
        events = self._recorded()
        on_device = [event for event in events if event.on_device]
        if on_device:
            return tabulate((event.name, phases_of_kernel(event), event.duration) for event in on_device)
        return tabulate((e.name, phases_of_operator(e), e.duration) for e in outermost_operators(events))

    def counts(self) -> dict[str, int]:
        """How often each of PHASES was computed, counted in operators on every device.

        An epilogue is what a fused block does beside its convolution: bias, residual, activation, mask.
        """
        counts = dict.fromkeys(PHASES, 0)
        for event in outermost_operators(self._recorded()):
            for phase in phases_of_operator(event):
                counts[phase] += 1
        return counts

    def diff(self, after: profile) -> ProfileDiff:
        """What changed from this profile to `after`.

        Raises:
            TypeError: if `after` is not a profile.
        """
        if not isinstance(after, profile):
            raise TypeError(f"after must be a profile, got {type(after).__name__}")
        return compare(self.kernels(), self.counts(), after.kernels(), after.counts())

    def to_dict(self) -> dict[str, Any]:
        """``{"counts": {phase: int}, "kernels": [row, ...]}``, plain data; a row has :class:`KernelRow`'s fields."""
        return {"counts": self.counts(), "kernels": self.kernels().to_dicts()}

    def to_chrome_trace(self, path: str | Path) -> None:
        """Writes a trace for chrome://tracing or ui.perfetto.dev to `path` (JSON, or gzip if it ends in .gz).

        Raises:
            FileNotFoundError: if the folder of `path` is not there: torch's profiler would only log it.
        """
        self._recorded()
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"path must be in an existing folder, got {str(path)!r}")
        self._profiler.export_chrome_trace(str(path))

    def _recorded(self) -> list[Event]:
        if self._events is None:
            raise RuntimeError("nothing is recorded yet: read a profile after its `with` block")
        return self._events
