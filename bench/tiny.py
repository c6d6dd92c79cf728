"""Networks of many tiny layers, converted, beside stock: their time is mostly what calls cost the host.

    PYTHONPATH=.:build/clients python bench/tiny.py [--rounds 31] [--check]

A step is a forward and a backward pass of one image on one thread of a CPU, in eval mode: of a frozen network whose
input learns, and of one in which all parameters learn too. `make clients` puts the libraries beside the environment; a
network whose library is not there is not run, which `--check` takes for a failure.
"""

import argparse
import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import freezekit as fk
from bench.options import threads
from bench.packages import missing
from bench.timing import HostClock, Interleaved, interleave

BOUND = 1.02
CREATES = {"timm": ("timm", "create_model"), "torchvision": ("torchvision.models", "get_model")}
# Library, network, and sizes of its image.
NETWORKS = (
    ("timm", "ghostnetv3_050", (64, 96)),
    ("timm", "mobilenetv4_conv_small", (32, 64)),
    ("timm", "efficientvit_b0", (32, 64)),
    ("torchvision", "shufflenet_v2_x0_5", (32, 64)),
)


@dataclass(frozen=True)
class TinyNetwork:
    """A network of a library, on an image of `size` x `size`."""

    library: str
    network: str
    size: int
    frozen: bool

    @property
    def name(self) -> str:
        return f"{self.network}, {self.size}x{self.size}, {'frozen' if self.frozen else 'trainable'}"

    def make(self) -> nn.Module:
        place, create = CREATES[self.library]
        model: nn.Module = getattr(importlib.import_module(place), create)(self.network, num_classes=10)
        return model.eval().requires_grad_(not self.frozen)

    def timed(self, rounds: int, seed: int) -> Interleaved:
        """Stock and converted."""
        torch.manual_seed(seed)
        stock = self.make()
        ours = fk.convert(copy.deepcopy(stock))
        x = torch.randn(1, 3, self.size, self.size, requires_grad=True)
        steps = {"stock": _step(stock, x), "freezekit": _step(ours, x)}
        with threads(1):
            return interleave(steps, clock=HostClock(), rounds=rounds, calls=2, warmup=3, seed=seed)


def _step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(model(x).sum(), wanted, allow_unused=True)


def cases() -> Iterator[TinyNetwork]:
    """Every network, small and smaller, frozen and not."""
    for library, network, sizes in NETWORKS:
        for size in sizes:
            for frozen in (True, False):
                yield TinyNetwork(library, network, size, frozen)


def measured(networks: Iterator[TinyNetwork], rounds: int, seed: int) -> Iterator[tuple[TinyNetwork, float | None]]:
    """Each network and freezekit's time over stock's, the median of rounds; None where its library is missing.

    One above the bound is measured again, four times as long.
    """
    for network in networks:
        if missing(network.library):
            yield network, None
            continue
        found = network.timed(rounds, seed).ratio("freezekit", "stock").median
        if found > BOUND:
            found = network.timed(4 * rounds, seed).ratio("freezekit", "stock").median
        yield network, found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds for each network")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="exit with 1 if one is above the bound, or not run")
    args = parser.parse_args(arguments)
    failed = False
    for network, ratio in measured((each for each in cases() if args.only in each.name), args.rounds, args.seed):
        failed |= ratio is None or ratio > BOUND
        if ratio is None:
            print(f"not run  {network.name}: {missing(network.library)}", flush=True)
        else:
            print(f"{ratio:7.3f}  {network.name}{'  above' if ratio > BOUND else ''}", flush=True)
    return 1 if args.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
