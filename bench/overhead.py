"""What one call costs beside `nn.Conv2d` when there is next to nothing to compute: forward and backward, CPU.

    python bench/overhead.py [--rounds 200] [--check]

Each timing is `conv(x)` and `torch.autograd.grad` of what needs a gradient, with a ready-made gradient of y, so that no
other operator dilutes the ratio. The bound is the project's own: 1.3 for a frozen layer, 1.65 for a trainable one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import freezekit as fk
from bench.timing import HostClock, Interleaved, interleave


@dataclass(frozen=True)
class TinyLayer:
    """A layer on a (1, channels, 8, 8) input that needs a gradient; `bound` is the highest ratio that passes."""

    channels: int
    out_channels: int
    frozen: bool
    bound: float

    @property
    def name(self) -> str:
        state = "frozen" if self.frozen else "trainable"
        return f"{state:9} 1x{self.channels}x8x8, {self.channels}->{self.out_channels}, 3x3"


CASES = [
    TinyLayer(channels, out_channels, frozen, 1.3 if frozen else 1.65)
    for channels, out_channels in [(1, 1), (1, 8), (8, 8)]
    for frozen in (True, False)
]


def make_step(conv: nn.Conv2d, x: Tensor) -> Callable[[], object]:
    """A forward and a backward of one layer."""
    dy = torch.ones_like(conv(x))
    wanted = [x, *(p for p in conv.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(conv(x), wanted, dy)


def measure(case: TinyLayer, *, rounds: int, calls: int, seed: int) -> Interleaved:
    """Stock and freezekit, interleaved, on one thread."""
    torch.manual_seed(seed)
    stock = nn.Conv2d(case.channels, case.out_channels, 3).requires_grad_(not case.frozen)
    ours = fk.FreezableConv2d.from_conv2d(stock)
    x = torch.randn(1, case.channels, 8, 8, requires_grad=True)
    steps = {"stock": make_step(stock, x), "freezekit": make_step(ours, x)}
    return interleave(steps, clock=HostClock(), rounds=rounds, calls=calls, warmup=calls, seed=seed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="interleaved rounds for each case")
    parser.add_argument("--calls", type=int, default=20, help="calls that one timing averages over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a ratio is above its bound")
    args = parser.parse_args(arguments)
    if args.rounds < 1 or args.calls < 1:
        parser.error(f"--rounds and --calls must be at least 1, got {args.rounds} and {args.calls}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    failed = False
    try:
        print(f"torch {torch.__version__}, freezekit {fk.__version__}, CPU, 1 thread")
        print(f"{'layer':36} {'stock us':>9} {'freezekit us':>13} {'ratio':>14} {'bound':>6}")
        for case in CASES:
            timed = measure(case, rounds=args.rounds, calls=args.calls, seed=args.seed)
            ratio = timed.ratio("freezekit", "stock")
            stock, ours = timed.time("stock").median, timed.time("freezekit").median
            verdict = "" if ratio.median <= case.bound else "  above"
            failed |= ratio.median > case.bound
            print(
                f"{case.name:36} {stock * 1e6:9.2f} {ours * 1e6:13.2f} {ratio.median:7.3f} "
                f"± {ratio.relative * 100:3.0f}% {case.bound:6.2f}{verdict}",
                flush=True,
            )
    finally:
        torch.set_num_threads(threads)
    return 1 if args.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
