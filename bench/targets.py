"""Measures what the project promises on a CPU, and says of each promise whether it holds here and now.

    python bench/targets.py [--check] [--threads N] [--batch N]

- A converted layer's own cost on tiny tensors: at most 1.05 of stock's for convolutions, 1.02 for others (one thread;
  bench/overhead.py).
- A network of many tiny layers, converted: at most 1.02 of stock's (one thread; bench/tiny.py). Without timm and
  torchvision it is not run, and so does not hold.
- A frozen layer's step, geometric mean over ResNet-50's layers: at most 1.03 of stock's.
- The backward pass of a layer whose bias alone learns: at most 0.6 of stock's, geometric mean over the same layers.
- The backward pass of a frozen layer: at most 1.03 of stock's at every point of a sweep (bench/dgrad.py).

Exit code 0; with --check 1 if a promise does not hold, or was not run. A machine that is busy with something else
proves nothing.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import dgrad, overhead, tiny
from bench.environment import describe
from bench.layer_lists import layers_of
from bench.measure import measure
from bench.options import threads
from bench.sections.layers import layer_case
from bench.settings import Settings
from bench.timing import HostClock, small_heap


@dataclass(frozen=True)
class Target:
    """A promise and what was measured; both are ratios to stock's time. None where it was not: `why` tells."""

    name: str
    bound: float
    measured: float | None
    why: str = ""

    @property
    def holds(self) -> bool:
        return self.measured is not None and self.measured <= self.bound

    def __str__(self) -> str:
        if self.measured is None:
            return f"not run               {self.name}: {self.why}"
        return f"{'holds' if self.holds else 'FAILS':6} {self.measured:.3f} <= {self.bound:.2f}  {self.name}"


def overhead_targets(rounds: int, seed: int) -> Iterator[Target]:
    """The cost of calls with next to no arithmetic."""
    for case in overhead.CASES:
        with threads(1):
            timed = overhead.measure(case, rounds=rounds, calls=20, seed=seed)
        yield Target(f"call  {case.name}", case.bound, timed.ratio("freezekit", "stock").median)


def layer_target(name: str, part: str, regime: str, bound: float, settings: Settings, network: str) -> Target:
    """The geometric mean of a network's layers."""
    peaks, clock = describe(settings.device, settings.dtype).peaks, HostClock()
    ratios = []
    for layer in layers_of(network):
        _, ours = measure(layer_case(network, layer, part, regime, settings), settings, peaks, clock)
        if ours.ratio is None:
            raise RuntimeError(f"{layer.name}: {ours.failure}")
        ratios.append(ours.ratio.median)
        print(
            f"  {layer.name:22} {layer.shape:34} {ours.ratio.median:.3f} ± {ours.ratio.relative * 100:.0f}%", flush=True
        )
    return Target(name, bound, statistics.geometric_mean(ratios))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a promise does not hold")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=15, help="rounds for each layer")
    parser.add_argument("--layers", default="resnet50", help="a layer list of bench/layer_lists.py")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    settings = Settings(torch.device("cpu"), torch.float32, args.batch, args.repeat, args.repeat, seed=args.seed)
    targets: list[Target] = []
    with threads(args.threads), small_heap():
        for line in describe(settings.device, settings.dtype).lines():
            print(line)
        targets += overhead_targets(10 * args.repeat, args.seed)
        for network, ratio in tiny.measured(tiny.cases(), 2 * args.repeat, args.seed):
            targets.append(Target(f"tiny  {network.name}", tiny.BOUND, ratio, tiny.missing(network.library)))
        for title, part, regime, bound in (
            (f"frozen step, {args.layers}", "step", "frozen", 1.03),
            (f"bias-only backward, {args.layers}", "backward", "bias only", 0.6),
        ):
            print(title, flush=True)
            targets.append(layer_target(title, part, regime, bound, settings, args.layers))
        for point, ratio in dgrad.measured(dgrad.points(), 4 * args.repeat, args.seed):
            targets.append(Target(f"dgrad {point.name}", dgrad.BOUND, ratio))
    for target in targets:
        print(target)
    return 1 if args.check and not all(target.holds for target in targets) else 0


if __name__ == "__main__":
    sys.exit(main())
