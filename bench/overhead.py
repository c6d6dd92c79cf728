"""What one call costs beside torch's own when there is next to nothing to compute: forward and backward, CPU.

    python bench/overhead.py [--rounds 200] [--check]

Each timing is `layer(x)` and `torch.autograd.grad` of what needs a gradient, with a ready-made gradient of y, so that
no other operator dilutes the ratio. First converted layers: 1.05 of stock's for a convolution, 1.02 for others. Then
torch's operators, with freezekit enabled and without: 1.15 for a call that is served, 1.05 for one that is torch's, as
chains are of fewer than 8 KiB. And disabled again, which is 1 but for the noise: torch's dispatch tables are what they
were.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import freezekit as fk
from bench.options import threads
from bench.timing import HostClock, Interleaved, interleave


@dataclass(frozen=True)
class TinyLayer:
    """A layer of torch.nn on a (1, channels, 8, 8) input with a gradient; `bound` is the highest ratio that passes."""

    name: str
    make: Callable[[], nn.Module]
    bound: float
    channels: int = 8


def _convolution(channels: int, out_channels: int, frozen: bool, kernel: int = 3, bias: bool = True) -> TinyLayer:
    state = "frozen" if frozen else "trainable"
    return TinyLayer(
        f"{state:9} 1x{channels}x8x8, {channels}->{out_channels}, {kernel}x{kernel}{'' if bias else ', no bias'}",
        lambda: nn.Conv2d(channels, out_channels, kernel, bias=bias).requires_grad_(not frozen),
        CONVOLUTION,
        channels,
    )


CONVOLUTION, LAYER = 1.05, 1.02
CASES = [
    *(_convolution(c, k, frozen) for c, k in [(1, 1), (1, 8), (8, 8)] for frozen in (True, False)),
    *(_convolution(8, 8, frozen, kernel=1, bias=False) for frozen in (True, False)),
    TinyLayer("frozen BatchNorm2d, eval", lambda: nn.BatchNorm2d(8).eval().requires_grad_(False), LAYER),
    TinyLayer("BatchNorm2d", lambda: nn.BatchNorm2d(8), LAYER),
    TinyLayer("ReLU", nn.ReLU, LAYER),
    TinyLayer("ReLU6", nn.ReLU6, LAYER),
    TinyLayer("Hardtanh", nn.Hardtanh, LAYER),
    TinyLayer("LeakyReLU", nn.LeakyReLU, LAYER),
    TinyLayer("frozen PReLU", lambda: nn.PReLU().requires_grad_(False), LAYER),
    TinyLayer("SiLU", nn.SiLU, LAYER),
    TinyLayer("GELU", nn.GELU, LAYER),
    TinyLayer("Hardswish", nn.Hardswish, LAYER),
    TinyLayer("Mish", nn.Mish, LAYER),
    TinyLayer("Dropout", nn.Dropout, LAYER),
    TinyLayer("MaxPool2d", lambda: nn.MaxPool2d(2), LAYER),
    TinyLayer("AvgPool2d", lambda: nn.AvgPool2d(2), LAYER),
    TinyLayer("AdaptiveAvgPool2d", lambda: nn.AdaptiveAvgPool2d(2), LAYER),
    TinyLayer("frozen GroupNorm", lambda: nn.GroupNorm(2, 8).requires_grad_(False), LAYER),
    TinyLayer("frozen LayerNorm", lambda: nn.LayerNorm(8).requires_grad_(False), LAYER),
]


@dataclass(frozen=True)
class OperatorCall:
    """A call on a (1, 8, size, size) input, with freezekit enabled; `served` where freezekit gains from it."""

    name: str
    call: Callable[[Tensor], Tensor]
    served: bool
    gradient: bool = True
    size: int = 8

    @property
    def bound(self) -> float:
        return 1.15 if self.served else 1.05


def _calls() -> list[OperatorCall]:
    frozen, trainable = nn.Conv2d(8, 8, 3).requires_grad_(False), nn.Conv2d(8, 8, 3)
    norm = nn.BatchNorm2d(8).eval().requires_grad_(False)
    groups = nn.GroupNorm(2, 8).requires_grad_(False)

    def pad(x: Tensor) -> Tensor:
        return functional.pad(x, (1, 1, 1, 1), "reflect")

    chains = {
        "group norm and silu": lambda x: functional.silu(groups(x)),
        "silu(x) * x": lambda x: functional.silu(x) * x,
        "quick GELU": lambda x: x * torch.sigmoid(1.702 * x),
    }
    return [
        OperatorCall("frozen convolution", frozen, served=True),
        OperatorCall("relu", functional.relu, served=True),
        OperatorCall("batch norm by statistics", norm, served=True),
        OperatorCall("max_pool2d", lambda x: functional.max_pool2d(x, 2), served=True),
        OperatorCall("avg_pool2d", lambda x: functional.avg_pool2d(x, 2), served=True),
        OperatorCall("dropout", lambda x: functional.dropout(x, 0.5), served=True),
        OperatorCall("reflection pad", pad, served=True),
        *(OperatorCall(f"{name}, 8 KiB", call, served=True, size=16) for name, call in chains.items()),
        *(OperatorCall(f"{name}, 2 KiB", call, served=False) for name, call in chains.items()),
        OperatorCall("trainable convolution", trainable, served=False),
        OperatorCall("group norm", groups, served=False),
        OperatorCall("product", lambda x: x * x, served=False),
        OperatorCall("convolution, no gradient", frozen, served=False, gradient=False),
        OperatorCall("relu, no gradient", functional.relu, served=False, gradient=False),
        OperatorCall("product, no gradient", lambda x: x * x, served=False, gradient=False),
        OperatorCall("reflection pad, no gradient", pad, served=False, gradient=False),
        OperatorCall("max_pool2d, no gradient", lambda x: functional.max_pool2d(x, 2), served=False, gradient=False),
        OperatorCall("dropout, eval", lambda x: functional.dropout(x, 0.5, False), served=False, gradient=False),
    ]


@contextmanager
def _disabled_again() -> Iterator[None]:
    with fk.enabled():
        pass
    yield


@contextmanager
def _warmed(switched: AbstractContextManager[object], step: Callable[[], object], calls: int) -> Iterator[None]:
    """A switch leaves the processor's caches cold, which is not part of what a call costs."""
    with switched:
        for _ in range(calls):
            step()
        yield


def measure_call(call: OperatorCall, *, rounds: int, calls: int, seed: int) -> Interleaved:
    """The same call without freezekit, with it enabled and after that, interleaved, on one thread."""
    x = torch.randn(1, 8, call.size, call.size, requires_grad=call.gradient)
    dy = torch.ones_like(call.call(x))

    def step() -> object:
        y = call.call(x)
        return torch.autograd.grad(y, x, dy) if call.gradient else y

    switches = {"stock": nullcontext, "freezekit": fk.enabled, "disabled": _disabled_again}
    steps = dict.fromkeys(switches, step)
    within = {name: lambda switch=switch: _warmed(switch(), step, calls) for name, switch in switches.items()}
    return interleave(steps, clock=HostClock(), rounds=rounds, calls=calls, warmup=calls, seed=seed, within=within)


def make_step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward and a backward of one layer."""
    dy = torch.ones_like(layer(x))
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def measure(case: TinyLayer, *, rounds: int, calls: int, seed: int) -> Interleaved:
    """Stock and converted, interleaved, on one thread."""
    torch.manual_seed(seed)
    stock = case.make()
    ours = fk.convert(copy.deepcopy(stock))
    x = torch.randn(1, case.channels, 8, 8, requires_grad=True)
    steps = {"stock": make_step(stock, x), "freezekit": make_step(ours, x)}
    return interleave(steps, clock=HostClock(), rounds=rounds, calls=calls, warmup=calls, seed=seed)


def _show(name: str, timed: Interleaved, bound: float, others: str = "") -> bool:
    """Prints a row, with `others` at its end; whether its ratio is above the bound."""
    ratio = timed.ratio("freezekit", "stock")
    stock, ours = timed.time("stock").median, timed.time("freezekit").median
    verdict = "" if ratio.median <= bound else "  above"
    print(
        f"{name:40} {stock * 1e6:9.2f} {ours * 1e6:13.2f} {ratio.median:7.3f} ± {ratio.relative * 100:3.0f}% "
        f"{bound:6.2f}{others}{verdict}",
        flush=True,
    )
    return ratio.median > bound


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="interleaved rounds for each case")
    parser.add_argument("--calls", type=int, default=20, help="calls that one timing averages over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a ratio is above its bound")
    args = parser.parse_args(arguments)
    if args.rounds < 1 or args.calls < 1:
        parser.error(f"--rounds and --calls must be at least 1, got {args.rounds} and {args.calls}")
    failed = False
    with threads(1):
        print(f"torch {torch.__version__}, freezekit {fk.__version__}, CPU, 1 thread")
        print(f"{'layer':40} {'stock us':>9} {'freezekit us':>13} {'ratio':>14} {'bound':>6}")
        options = {"rounds": args.rounds, "calls": args.calls, "seed": args.seed}
        for case in CASES:
            failed |= _show(case.name, measure(case, **options), case.bound)
        print(f"{'operator':40} {'stock us':>9} {'enabled us':>13} {'ratio':>14} {'bound':>6} {'disabled':>9}")
        for call in _calls():
            timed = measure_call(call, **options)
            failed |= _show(call.name, timed, call.bound, f"{timed.ratio('disabled', 'stock').median:10.3f}")
    return 1 if args.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
