"""Times several ways of doing one thing side by side: each round runs every candidate once, in shuffled order.

A machine speeds up, slows down and is shared, and two runs minutes apart differ by more than the effect in question.
Interleaved candidates see the same machine, so the ratio within a round is reliable, and its median is reported.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

Timeable = Callable[[], object]


class Clock(Protocol):
    """Runs a step `calls` times and returns the seconds that one call took on average."""

    def __call__(self, step: Timeable, calls: int) -> float: ...


class HostClock:
    """Wall time on the host, for steps that are done when they return (CPU tensors)."""

    def __call__(self, step: Timeable, calls: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(calls):
            step()
        return (time.perf_counter_ns() - start) / calls / 1e9


class CudaClock:
    """Time between two events on the current CUDA stream: the device's, never the host's.

    The device waits before the first event while the host queues the whole step: what the host takes to launch it is
    then no part of its time. A timing counts only if the device was still waiting when the last launch was queued;
    else it is repeated with twice the wait, up to `LONGEST_WAIT` (a step that synchronises is never ahead).

    Before the wait either the L2 cache is overwritten (`cold`, the default: a layer in a training step finds its
    tensors in device memory), or the step runs once untimed.
    """

    FIRST_WAIT, LONGEST_WAIT = 1e-3, 64e-3

    def __init__(self, device: torch.device, cold: bool = True) -> None:
        self.device = device
        self.cold = cold
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * l2_bytes, 128 << 20) if cold else 0, dtype=torch.uint8, device=device)
        self._wait = self.FIRST_WAIT
        cycles = 1_000_000
        self._between(lambda: torch.cuda._sleep(cycles))  # The first launch pays for loading the kernel.
        self._cycles_per_second = cycles / self._between(lambda: torch.cuda._sleep(cycles))[0]

    def __call__(self, step: Timeable, calls: int) -> float:
        return sum(self._one(step) for _ in range(calls)) / calls

    def _one(self, step: Timeable) -> float:
        while True:
            if self.cold:
                self._flush.zero_()
            else:
                step()
            torch.cuda._sleep(int(self._wait * self._cycles_per_second))
            seconds, ahead = self._between(step)
            if ahead or self._wait >= self.LONGEST_WAIT:
                return seconds
            self._wait *= 2

    def _between(self, step: Timeable) -> tuple[float, bool]:
        """Seconds that the device took, and whether it had not begun when the host had queued everything."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        ahead = not begin.query()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, ahead


def clock_for(device: torch.device, cold: bool = True) -> Clock:
    """The clock that belongs to a device."""
    return CudaClock(device, cold) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """Half the distance between the quartiles as a fraction of the median: the figure after a plus-minus sign.

        >>> Spread(10.0, 9.0, 11.0).relative
        0.1
        """
        return (self.high - self.low) / 2 / self.median if self.median else 0.0

    @staticmethod
    def of(values: list[float]) -> Spread:
        """
        >>> Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0)

        Raises:
            ValueError: if `values` is empty.
        """
        if not values:
            raise ValueError("a spread needs at least one value, got none")
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


@dataclass(frozen=True)
class Interleaved:
    """Seconds per call of every candidate, one value per round; the i-th values are of the same round."""

    seconds: Mapping[str, list[float]]

    def time(self, name: str) -> Spread:
        """Seconds of one call."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, reference: str) -> Spread:
        """`name`'s time divided by `reference`'s, round by round: above 1 is slower than the reference."""
        return Spread.of(self.ratios(name, reference))

    def ratios(self, name: str, reference: str) -> list[float]:
        """The same for each round."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[reference], strict=True)]


def median_interval(values: list[float]) -> tuple[float, float]:
    """The ends of an interval that holds the median of what `values` were drawn from, 19 times of 20 or more.

    By order statistics, whatever the distribution: each value is below the median as often as a coin shows heads. Fewer
    than six values are too few: their least and greatest are given.

    >>> median_interval([float(i) for i in range(1, 21)])
    (6.0, 15.0)

    Raises:
        ValueError: if `values` is empty.
    """
    if not values:
        raise ValueError("an interval needs at least one value, got none")
    n, left_out, tail = len(values), 0, 1 / 2 ** len(values)
    while (tail := tail + math.comb(n, left_out + 1) / 2**n) <= 0.025:
        left_out += 1
    in_order = sorted(values)
    return in_order[left_out], in_order[n - 1 - left_out]


@contextmanager
def small_heap() -> Iterator[None]:
    """Hides from the collector what is alive now, so that the collection before each count is cheap.

    Within another one, or in a program that has frozen its objects, they stay hidden afterwards.
    """
    within = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not within:
            gc.unfreeze()


@contextmanager
def _no_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    steps: Mapping[str, Timeable],
    *,
    clock: Clock,
    rounds: int,
    calls: int = 1,
    warmup: int = 2,
    seed: int = 0,
    within: Mapping[str, Callable[[], AbstractContextManager[object]]] = MappingProxyType({}),
) -> Interleaved:
    """Times `steps` in `rounds` interleaved rounds.

    Args:
        steps: what to call, by name.
        clock: see :func:`clock_for`.
        rounds: how often each step is timed; at least 1.
        calls: calls that one timing averages over; more for steps of a few microseconds.
        warmup: untimed calls of each step first (libraries choose algorithms, caches fill).
        seed: of the order within rounds.
        within: by a step's name, what to enter for it; entering is not timed.

    Raises:
        ValueError: if `rounds` or `calls` is below 1, or `steps` is empty.
    """
    if not steps:
        raise ValueError("interleave needs at least one step, got none")
    if rounds < 1 or calls < 1:
        raise ValueError(f"rounds and calls must be at least 1, got {rounds} and {calls}")
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(seed)
    with _no_collector():
        for name in names:
            with within.get(name, nullcontext)():
                for _ in range(warmup):
                    steps[name]()
        for _ in range(rounds):
            for name in order.sample(names, len(names)):
                with within.get(name, nullcontext)():
                    seconds[name].append(clock(steps[name], calls))
    return Interleaved(seconds)
