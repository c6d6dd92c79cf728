"""What a plan holds and how it shows it, and how fast the machine is that its times are predicted for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from freezekit._arguments import check_real
from freezekit._showing import BLUE, ORANGE, Shown, console_for, figure


@dataclass(frozen=True)
class Machine:
    """What predictions of time are made from, measured by `measure`.

    Attributes:
        flops: floating-point operations per second, of a matrix product.
        bandwidth: bytes per second, read and written, of a copy.

    Raises:
        ValueError, TypeError: one of them is not a number above 0.
    """

    flops: float
    bandwidth: float

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth"):
            value = getattr(self, name)
            check_real(name, value)
            if not value > 0:
                raise ValueError(f"{name} must be a number above 0, got {value}")

    @staticmethod
    def measure(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
        """Times matrix products and copies on `device`: about 0.2 s."""
        device = torch.device(device)
        # On a GPU a single small kernel between two waits would measure the host.
        size, calls = (4096, 10) if device.type == "cuda" else (1024, 1)
        own = torch.Generator(device).manual_seed(0)  # a plan draws no random numbers that others are to draw
        a = torch.randn(size, size, device=device, generator=own).to(dtype)
        b = torch.ones(2**24, device=device)
        out = torch.empty_like(b)
        product = seconds(lambda: [a @ a for _ in range(calls)], device) / calls
        copy = seconds(lambda: [out.copy_(b) for _ in range(calls)], device) / calls
        return Machine(flops=2 * size**3 / product, bandwidth=2 * b.nbytes / copy)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of a few runs: what the machine can do when nothing else runs on it."""
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Option:
    """One way of freezing.

    Attributes:
        name: "depth 3" freezes the first three layers with parameters, in forward order; else a named regime.
        frozen: names of the parameters that it freezes.
        bytes_kept: between forward and backward, parameters and buffers aside.
        backward_flops: of dgrad and wgrad.
        backward_seconds: predicted: for each layer the larger of its operations over the machine's rate and its bytes
            over the machine's bandwidth.
        trainable: elements that still learn.
        measured_bytes, measured_seconds: the same as a real step showed; None where nothing was measured.
    """

    name: str
    frozen: tuple[str, ...]
    bytes_kept: int
    backward_flops: int
    backward_seconds: float
    trainable: int
    measured_bytes: int | None = None
    measured_seconds: float | None = None


class Plan(Shown):
    """All options, shallowest first, and the one that fits the budget.

    Attributes:
        options: depths in order, then the named regimes.
        choice: the shallowest depth that fits; None if even the deepest does not, or if there is no budget.
        machine: what times are predicted from.
    """

    def __init__(self, options: list[Option], machine: Machine, memory: float | None, seconds: float | None) -> None:
        self.options = options
        self.machine = machine
        self.memory = memory
        self.time = seconds
        self.fits = [
            (memory is None or option.bytes_kept <= memory) and (seconds is None or option.backward_seconds <= seconds)
            for option in options
        ]
        depths = [o for o, fits in zip(options, self.fits) if fits and o.name.startswith("depth ")]
        self.choice = depths[0] if depths and (memory is not None or seconds is not None) else None

    def __iter__(self) -> Iterator[Option]:
        return iter(self.options)

    def __repr__(self) -> str:
        return f"Plan({len(self.options)} options, choice={self.choice.name if self.choice else None})"

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, of predicted and measured backward times: 1 where the order is right; None where unmeasured."""
        pairs = [(o.backward_seconds, o.measured_seconds) for o in self if o.measured_seconds is not None]
        if len({predicted for predicted, _ in pairs}) < 2 or len({measured for _, measured in pairs}) < 2:
            return None
        return statistics.correlation(*(_ranks(list(values)) for values in zip(*pairs)))

    def to_dict(self) -> dict[str, Any]:
        """`{"options": [...], "choice": name or None, "machine": {...}, "rank_correlation": number or None}`.

        Plain data: bytes, FLOPs, seconds.
        """
        choice = self.choice.name if self.choice else None
        options = [{**asdict(option), "frozen": list(option.frozen)} for option in self.options]
        found = {"options": options, "choice": choice, "machine": asdict(self.machine)}
        return {**found, "rank_correlation": self.rank_correlation}

    def print(self, console: Console | None = None) -> None:
        """A table of the options; the choice is marked."""
        from rich.table import Table

        budget = "" if self.memory is None else f", at most {self.memory / 2**20:.1f} MiB"
        budget += "" if self.time is None else f", at most {self.time * 1e3:.1f} ms backward"
        order = self.rank_correlation
        caption = None if order is None else f"order of predicted and measured times: {order:.2f} (rank correlation)"
        table = Table("option", title=f"what freezing would buy{budget}", caption=caption)
        for column in ("parameters frozen", "learning", "kept (MiB)", "backward (GFLOP)", "backward (ms)"):
            table.add_column(column, justify="right")
        measured = any(option.measured_bytes is not None for option in self)
        for column in ("measured (MiB)", "measured (ms)") if measured else ():
            table.add_column(column, justify="right")
        table.add_column("")
        for option, fits in zip(self.options, self.fits):
            mark = "<- fits first" if option is self.choice else "" if fits else "over budget"
            kept, flops = f"{option.bytes_kept / 2**20:.2f}", f"{option.backward_flops / 1e9:.3f}"
            milliseconds = f"{option.backward_seconds * 1e3:.2f}"
            frozen, learning = str(len(option.frozen)), f"{option.trainable:,}"
            real = _measured(option) if measured else ()
            table.add_row(option.name, frozen, learning, kept, flops, milliseconds, *real, mark)
        console_for(console).print(table)

    def plot(self, path: str | Path) -> None:
        """A PNG: kept memory and predicted backward time against the depth of freezing.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        depths = [option for option in self.options if option.name.startswith("depth ")]
        made = figure(7, 4)
        left = made.subplots()
        right = left.twinx()
        left.plot([o.bytes_kept / 2**20 for o in depths], color=BLUE, marker="o", label="kept for backward")
        right.plot(
            [o.backward_seconds * 1e3 for o in depths], color=ORANGE, marker="s", linestyle="--", label="backward"
        )
        left.set_xlabel("layers frozen, in forward order")
        left.set_ylabel("kept for backward [MiB]")
        right.set_ylabel("predicted backward time [ms]")
        left.set_ylim(bottom=0)
        right.set_ylim(bottom=0)
        made.legend(loc="outside upper center", ncols=2)
        made.savefig(path, dpi=150)


def _ranks(values: list[float]) -> list[float]:
    """The place of each value in order; equal ones share the mean of their places.

    >>> _ranks([3.0, 1.0, 3.0])
    [1.5, 0.0, 1.5]
    """
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def _measured(option: Option) -> tuple[str, str]:
    if option.measured_bytes is None or option.measured_seconds is None:
        return "", ""
    return f"{option.measured_bytes / 2**20:.2f}", f"{option.measured_seconds * 1e3:.2f}"
