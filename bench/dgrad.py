"""The backward pass of frozen convolutions beside stock's, at every point of a sweep: ATen's way changes with the size.

    python bench/dgrad.py [--threads 1] [--rounds 60] [--check]

Both sides ask autograd for the gradient of x alone, so stock runs `convolution_backward` with that mask. The bound is
for every point, not for their mean: a network may consist of one point. What is told is the most that the median of all
rounds may be, so noise can only make a point fail.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import freezekit as fk
from bench.options import threads
from bench.timing import HostClock, Interleaved, interleave, median_interval

BOUND = 1.03
THREADS = (1, 2)
CHANNELS = ((64, 3), (3, 64), (512, 1), (16, 16), (64, 64), (32, 8))


@dataclass(frozen=True)
class Point:
    """A convolution of square images and filters, padded to keep the size."""

    channels: int
    out_channels: int
    kernel: int
    size: int
    batch: int
    threads: int

    @property
    def name(self) -> str:
        layer = f"{self.channels}->{self.out_channels}, {self.kernel}x{self.kernel}"
        return f"{layer} at {self.size}x{self.size}, batch {self.batch}, {self.threads} threads"

    def timed(self, rounds: int, seed: int) -> Interleaved:
        """The backward passes of both sides."""
        torch.manual_seed(seed)
        stock = nn.Conv2d(self.channels, self.out_channels, self.kernel, padding=self.kernel // 2).requires_grad_(False)
        ours = fk.FreezableConv2d.from_conv2d(stock)
        x = torch.randn(self.batch, self.channels, self.size, self.size, requires_grad=True)
        with threads(self.threads):
            dy = torch.randn_like(stock(x))  # one for both: of two, one may be placed where it is read faster
            steps = {"stock": _backward(stock, x, dy), "freezekit": _backward(ours, x, dy)}
            return interleave(steps, clock=HostClock(), rounds=rounds, calls=5, warmup=3, seed=seed)


def _backward(conv: nn.Conv2d, x: Tensor, dy: Tensor) -> Callable[[], object]:
    y = conv(x)
    return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)


def points(counts: Sequence[int] = THREADS) -> Iterator[Point]:
    """The sweep on each of `counts` threads."""
    for count, (c, k), kernel, size, batch in itertools.product(counts, CHANNELS, (1, 3), (16, 32, 64), (1, 2, 3, 4)):
        yield Point(c, k, kernel, size, batch, count)


def measured(sweep: Iterator[Point], rounds: int, seed: int) -> Iterator[tuple[Point, float]]:
    """Each point and what freezekit's time over stock's is at most: the upper end of a median's 95 % interval.

    At first of six rounds. While it is above the bound, which may be noise, more are added, up to eight times `rounds`.
    """
    for point in sweep:
        ratios: list[float] = []
        for count in (6, rounds, 7 * rounds):
            ratios += point.timed(count, seed + len(ratios)).ratios("freezekit", "stock")
            _, most = median_interval(ratios)
            if most <= BOUND:
                break
        yield point, most


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, choices=THREADS, help="that half of the sweep alone")
    parser.add_argument("--rounds", type=int, default=60, help="interleaved rounds for a point that six leave open")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a point is above the bound")
    args = parser.parse_args(arguments)
    found = []
    for point, ratio in measured(points([args.threads] if args.threads else THREADS), args.rounds, args.seed):
        found.append(ratio)
        print(f"{ratio:6.3f}  {point.name}{'  above' if ratio > BOUND else ''}", flush=True)
    above = sum(ratio > BOUND for ratio in found)
    print(f"{len(found)} points, {above} above {BOUND}, the highest {max(found):.3f}")
    return 1 if args.check and above else 0


if __name__ == "__main__":
    sys.exit(main())
