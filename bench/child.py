"""Runs work in a process of its own: a kernel that hangs or crashes costs its own rows and nothing else."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from bench.environment import Peaks
from bench.measure import MakeCase, Measured, describe, measure
from bench.settings import Settings
from bench.sides import cudnn_benchmark
from bench.timing import clock_for, small_heap

READY = "ready"
T = TypeVar("T")


def serve(pipe: Connection) -> None:
    """The other process: what work gives, or why it fails, and what is wrong with the device since."""
    pipe.send(READY)
    with cudnn_benchmark(), small_heap():
        while True:
            try:
                work = pipe.recv()
            except EOFError:
                return
            try:
                answer, failure = work(), ""
            except Exception as error:  # of memory, say, which costs this work alone
                answer, failure = None, describe(error)
            pipe.send((answer, failure, _error_that_stays()))


def measure_there(make: MakeCase, settings: Settings, peaks: Peaks) -> list[Measured]:
    """Work: one case, made anew in the process."""
    return measure(make(), settings, peaks, clock_for(settings.device, settings.cold))


def _error_that_stays() -> str:
    """What the device answers to everything from now on in this process; nothing where all is well."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error).partition("\n")[0]
    return ""


class Lost(RuntimeError):
    """There is no answer; the text says why."""


class Child:
    """A process that is started when it is needed, and again after it was lost, up to `MOST_LOSSES` times.

    Args:
        serve: what it runs.
    """

    MOST_LOSSES = 3

    def __init__(self, serve: Callable[[Connection], None] = serve) -> None:
        self._serve = serve
        self._losses = 0
        self._pipe: Connection | None = None
        self._is_ready = False

    def start(self) -> None:
        """Returns at once: importing torch takes the process some seconds."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=self._serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._is_ready = False

    def ask(self, work: Callable[[], T], seconds: float) -> T:
        """What `work` gives there, in `seconds`, of which a start takes its part.

        Raises:
            Lost: if the work fails there, the process hangs or ends, or was lost too often to start it again.
        """
        if self._losses >= self.MOST_LOSSES:
            raise Lost(f"not tried: the side's process was lost {self._losses} times")
        until = time.monotonic() + seconds
        try:
            if self._pipe is None:
                self.start()
            assert self._pipe is not None
            if not self._is_ready:
                self._receive(until, seconds)
                self._is_ready = True
            self._pipe.send(work)
            answer, failure, error = self._receive(until, seconds)
        except (EOFError, OSError):
            self._process.join(5)
            raise self._lost(f"the side's process ended with exit code {self._process.exitcode}") from None
        if error:
            self._lost(error)
        if failure:
            raise Lost(failure)
        return answer

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self._pipe is None:
            return
        self._pipe.close()
        self._pipe = None
        self._process.join(1)
        self._process.kill()
        self._process.join(10)  # A kernel that hangs may hold it for longer: then it is left behind.

    def _receive(self, until: float, seconds: float) -> Any:
        assert self._pipe is not None
        if not self._pipe.poll(max(0.0, until - time.monotonic())):
            raise self._lost(f"no answer in {seconds:.3g} s")
        return self._pipe.recv()

    def _lost(self, why: str) -> Lost:
        self._losses += 1
        self.close()
        return Lost(why)
