"""Measures a side in a process of its own: a kernel that hangs or crashes costs its own rows and nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

from bench.environment import Peaks
from bench.measure import MakeCase, measure
from bench.measured import Measured
from bench.settings import Settings
from bench.sides import cudnn_benchmark
from bench.timing import clock_for, small_heap

READY = "ready"


def serve(pipe: Connection) -> None:
    """The other process: answers each case with its measurements, until the pipe is closed."""
    pipe.send(READY)
    with cudnn_benchmark(), small_heap():
        while True:
            try:
                make, settings, peaks = pipe.recv()
            except EOFError:
                return
            pipe.send(measure(make(), settings, peaks, clock_for(settings.device, settings.cold)))


class Lost(RuntimeError):
    """The process gave no answer; the text says why."""


class Child:
    """A process that is started when it is needed, and again after it was lost, up to `MOST_LOSSES` times.

    Args:
        serve: what it runs.
        start_limit: seconds until it must be ready; importing torch takes some.
        limit: seconds for one case.
    """

    MOST_LOSSES = 3

    def __init__(
        self, serve: Callable[[Connection], None] = serve, start_limit: float = 120.0, limit: float = 60.0
    ) -> None:
        self._serve = serve
        self._start_limit, self._limit = start_limit, limit
        self._losses = 0
        self._pipe: Connection | None = None

    def measure(self, make: MakeCase, settings: Settings, peaks: Peaks) -> list[Measured]:
        """What :func:`bench.measure.measure` gives there.

        Raises:
            Lost: if the process hangs or ends, or was lost too often to start it again.
        """
        if self._losses >= self.MOST_LOSSES:
            raise Lost(f"not tried: the side's process was lost {self._losses} times")
        try:
            if self._pipe is None:
                self._start()
            assert self._pipe is not None
            self._pipe.send((make, settings, peaks))
            return self._receive(self._limit)
        except (EOFError, OSError):
            self._process.join(5)
            raise self._lost(f"the side's process ended with exit code {self._process.exitcode}") from None

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self._pipe is None:
            return
        self._pipe.close()
        self._pipe = None
        self._process.join(1)
        self._process.kill()
        self._process.join(10)  # A kernel that hangs may hold it for longer: then it is left behind.

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=self._serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._receive(self._start_limit)

    def _receive(self, limit: float) -> list[Measured]:
        assert self._pipe is not None
        if not self._pipe.poll(limit):
            raise self._lost(f"no answer in {limit:g} s")
        return self._pipe.recv()

    def _lost(self, why: str) -> Lost:
        self._losses += 1
        self.close()
        return Lost(why)
