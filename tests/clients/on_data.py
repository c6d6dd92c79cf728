"""The networks of `tests.clients.kept` on data, converted and enabled, against stock.

Of each the bytes that it keeps, as the allocator counts them, its outputs, the gradient of its input, and the CPU time
of a forward and a backward pass on one thread, the three ways in turn.

    PYTHONPATH=.:build/clients python -m tests.clients.on_data ROWS [--client NAME ...] [--minutes M]

A network runs in a process of its own, bounded in memory and time; what fails is a row with its reason. Rows are added
to the file ROWS, in JSON: a later call goes on where this one stopped, and sums up all of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

import freezekit as fk
from bench.memory import trace
from bench.packages import missing
from bench.timing import Interleaved, Timeable, interleave
from tests.clients.harness import largest_error
from tests.clients.kept import CLIENTS, Network

SECONDS, BYTES = 120, 12 * 2**30  # of one network's process
PARAMETERS = 130_000_000  # of one network: more take minutes
TIMED = 9.0  # seconds, of which each way gets a third
ROUNDING = 1e-4  # of a gradient: sums in another order, through a hundred layers


@dataclass(frozen=True)
class Side:
    """A network converted or enabled, beside stock.

    Attributes:
        kept: bytes, of what stock keeps.
        equal: whether the outputs are stock's, bit for bit.
        error: the largest difference of the input's gradient, relative to its largest element.
        time: CPU seconds of a step, of what stock takes: the median of rounds.
    """

    kept: float
    equal: bool
    error: float
    time: float = field(default=1.0, compare=False)

    def is_wrong(self) -> bool:
        return not self.equal or not self.error <= ROUNDING


@dataclass(frozen=True)
class Row:
    """What is known of a network; `failure` says why nothing is."""

    client: str
    name: str
    stock: int = 0
    sides: dict[str, Side] = field(default_factory=dict)
    failure: str = ""

    def __str__(self) -> str:
        if self.failure:
            return f"| {self.client}: {self.name} | {self.failure} |"
        cells = [
            f"{side.kept:.3f}, {'=' if side.equal else 'differs'}, {f'{side.error:.0e}' if side.error else '='}, "
            f"{side.time:.3f}"
            for side in self.sides.values()
        ]
        return f"| {self.client}: {self.name} | {self.stock / 2**20:.1f} MiB | {' | '.join(cells)} |"

    @staticmethod
    def of(line: str) -> Row:
        found = json.loads(line)
        return Row(**{**found, "sides": {way: Side(**side) for way, side in found["sides"].items()}})


def scattered(model: nn.Module) -> nn.Module:
    """Weights that start at 0, and statistics that start at 0 and 1, would hide what is behind them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.02)
            elif name.endswith("running_mean"):
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
            elif name.endswith("running_var"):
                tensor.mul_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def run(call: Callable[[Tensor], Any], x: Tensor) -> tuple[int, list[Tensor], Tensor]:
    """Bytes kept between forward and backward, beside x and the outputs; the outputs; the gradient of x."""
    x = x.clone().requires_grad_()
    values: list[Tensor] = []
    edges: list[GradientEdge] = []

    def forward() -> None:
        torch.manual_seed(2)
        for y in tree_leaves(call(x)):
            if isinstance(y, Tensor) and y.requires_grad:
                values.append(y.detach().clone())
                edges.append(get_gradient_edge(y))

    kept = trace(x.device, forward).kept - sum(y.nbytes for y in values)
    seeds = [torch.linspace(0.5, 1, y.numel()).view(y.shape).to(y) for y in values]
    (gradient,) = torch.autograd.grad(edges, x, seeds)
    return kept, values, gradient


class CpuClock:
    """CPU seconds of this thread, which does not count what else the machine runs."""

    def __call__(self, step: Timeable, calls: int) -> float:
        start = time.thread_time()
        for _ in range(calls):
            step()
        return (time.thread_time() - start) / calls


def times(calls: Mapping[str, Callable[[Tensor], Any]], x: Tensor) -> Interleaved:
    """Forward and backward passes in turn, for some seconds."""

    def step(call: Callable[[Tensor], Any]) -> None:
        leaf = x.clone().requires_grad_()
        torch.manual_seed(2)
        values = [y for y in tree_leaves(call(leaf)) if isinstance(y, Tensor) and y.requires_grad]
        torch.autograd.grad(values, leaf, [torch.ones_like(y) for y in values])

    steps = {name: partial(step, call) for name, call in calls.items()}
    start = time.thread_time()
    steps["stock"]()
    rounds = int(TIMED / len(steps) / (time.thread_time() - start))
    return interleave(steps, clock=CpuClock(), rounds=min(max(rounds, 3), 41), within={"enabled": fk.enabled})


def measure(network: Network) -> Row:
    """Of one image, which takes half of the time; of two where that differs from stock.

    Torch's own gradient of a batch norm of one image is wrong for some strides: see docs/enable.md.
    """
    row = measure_images(network, 1)
    return measure_images(network, 2) if any(side.is_wrong() for side in row.sides.values()) else row


def measure_images(network: Network, count: int) -> Row:
    """Raises whatever the network does, and where its gradient tells nothing."""
    torch.manual_seed(0)
    model = network.make().eval().requires_grad_(False)
    if (size := sum(p.numel() for p in model.parameters())) > PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    scattered(model)
    shape = network.shape(model) if callable(network.shape) else network.shape
    x = torch.rand((count, *shape[1:]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network.call(model, x)  # what it sets up once is not what a step keeps
    stock, values, gradient = run(lambda x: network.call(model, x), x)
    if not gradient.isfinite().all() or not gradient.abs().max() > 0:
        raise ValueError("the gradient of the input is 0 or not finite")

    def side(model: nn.Module, within: AbstractContextManager[object]) -> Side:
        with within:
            kept, ours, dx = run(lambda x: network.call(model, x), x)
        equal = len(ours) == len(values) and all(map(torch.equal, ours, values))
        return Side(kept / stock, equal, largest_error([dx], [gradient]))

    again = side(model, nullcontext())
    if again.is_wrong():
        raise ValueError(f"stock is not stock's: gradients differ by {again.error:.0e}")
    converted = fk.convert(copy.deepcopy(model))
    sides = {"converted": side(converted, nullcontext()), "enabled": side(model, fk.enabled())}
    models = {"stock": model, "converted": converted, "enabled": model}
    timed = times({way: partial(network.call, model) for way, model in models.items()}, x)
    for way, side_ in sides.items():
        sides[way] = replace(side_, time=timed.ratio(way, "stock").median)
    return Row(network.client, network.name, stock, sides)


def _in_child(network: Network, to: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        row = measure(network)
    except Exception as error:
        row = Row(network.client, network.name, failure=f"{type(error).__name__}: {error}".split("\n")[0][:120])
    to.send(row)


def measured(network: Network, seconds: float = SECONDS) -> Row:
    """In a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_child, args=(network, theirs))
    child.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            return ours.recv()
        return Row(network.client, network.name, failure=f"more than {seconds:.0f} s")
    except EOFError:
        child.join()
        return Row(network.client, network.name, failure=f"its process ended with {child.exitcode}")
    finally:
        child.kill()
        child.join()


def summary(rows: list[Row]) -> str:
    """Lines: by client how many networks, mean and median of what they keep, and what differs."""
    lines = ["| client | networks | converted: mean | median | enabled: mean | median | time: converted | enabled |"]
    lines.append("|" + " --- |" * 8)
    counted = [row for row in rows if not row.failure]
    for client in [*dict.fromkeys(row.client for row in counted), "all"]:
        own = [row for row in counted if client in (row.client, "all")]
        cells = [
            f"{mean([row.sides[way].kept for row in own]):.3f}"
            for way in ("converted", "enabled")
            for mean in (statistics.mean, statistics.median)
        ]
        cells += [f"{statistics.mean(row.sides[way].time for row in own):.3f}" for way in ("converted", "enabled")]
        lines.append(f"| {client} | {len(own)} | {' | '.join(cells)} |")
    for way in ("converted", "enabled"):
        sides = [row.sides[way] for row in counted]
        wrong = [f"{row.client}: {row.name}" for row in counted if row.sides[way].is_wrong()]
        lines.append(
            f"{way}: outputs bit for bit in {sum(side.equal for side in sides)}, gradients in "
            f"{sum(not side.error for side in sides)} of {len(sides)}, the largest difference "
            f"{max((side.error for side in sides), default=0):.1e}; beyond rounding: {', '.join(wrong) or 'none'}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Clients' networks on data, against stock.")
    parser.add_argument("rows", type=Path, help="the file that rows are added to")
    names = [client.__name__ for client in CLIENTS]
    parser.add_argument("--client", action="append", choices=names, help="these alone")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no network after so many")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [Row.of(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    there = {(row.client, row.name) for row in rows}
    end = time.monotonic() + 60 * options.minutes
    for client in CLIENTS:
        if client.__name__ not in (options.client or names):
            continue
        if why := missing(client.__name__):
            print(why, file=sys.stderr)
            return 1
        for network in client():
            if (network.client, network.name) in there or time.monotonic() > end:
                continue
            rows.append(measured(network))
            print(rows[-1], flush=True)
            with options.rows.open("a") as file:
                print(json.dumps(asdict(rows[-1])), file=file)
    print(f"\n{summary(rows)}")
    return int(any(side.is_wrong() for row in rows for side in row.sides.values()))


if __name__ == "__main__":
    sys.exit(main())
