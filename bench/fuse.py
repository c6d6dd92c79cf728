"""Fused frozen blocks beside stock PyTorch on a CPU: six conv + BatchNorm + ReLU, or a network of torchvision.

    python bench/fuse.py [--rounds 15] [--threads 1] [--compile] [--check]
    python bench/fuse.py --network resnet18 --batch 1 --size 224 [--forward]

Everything is frozen and in eval mode. The input needs a gradient, as it does above trainable layers or for prompts, and
a step is one forward and one backward; with --forward it needs none, and a step is a forward. Ratios are medians over
interleaved rounds. The bounds are the project's own, for the six blocks: 0.8 of stock in channels_last, 0.72 in NCHW,
and with --compile not slower than torch.compile of stock.
"""

import argparse
import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import freezekit as fk
from bench.packages import missing
from bench.timing import HostClock, Interleaved, interleave
from freezekit.fusion import fuse

BOUNDS = {"channels_last": 0.8, "NCHW": 0.72}


def make_net(depth: int, channels: int, kernel: int) -> nn.Module:
    """`depth` blocks."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def settle(net: Any, dtype: torch.dtype) -> Any:
    """Frozen, with statistics and biases that are not 0, as in trained networks: else blocks may run otherwise."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    return net.eval().requires_grad_(False).to(dtype)


def make_step(net: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """A forward, and a backward where the input needs a gradient."""
    if not x.requires_grad:
        return lambda: net(x)
    dy = torch.ones_like(net(x))
    return lambda: torch.autograd.grad(net(x), x, dy)


def measure(layout: str, args: argparse.Namespace) -> Interleaved:
    """Stock and fused, the six blocks' convolutions alone and, if asked for, both compiled."""
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    dtype = getattr(torch, args.dtype)
    if args.network:
        torchvision: Any = importlib.import_module("torchvision")

        stock = settle(torchvision.models.get_model(args.network), dtype)
    else:
        stock = settle(make_net(args.depth, args.channels, args.kernel), dtype)
    stock.to(memory_format=memory_format)
    x = torch.randn(args.batch, 3 if args.network else args.channels, args.size, args.size, dtype=dtype)
    x = x.to(memory_format=memory_format).requires_grad_(not args.forward)
    fused = fuse(copy.deepcopy(stock))
    steps = {"stock": make_step(stock, x), "fused": make_step(fused, x)}
    if not args.network:  # what no fusion can save
        steps["convolutions"] = make_step(nn.Sequential(*(m for m in stock if isinstance(m, nn.Conv2d))), x)
    if args.compile:
        torch.compiler.reset()  # else the layouts share one limit of recompilations
        steps["compiled stock"] = make_step(torch.compile(copy.deepcopy(stock)), x)
        steps["compiled fused"] = make_step(torch.compile(copy.deepcopy(fused)), x)
    return interleave(steps, clock=HostClock(), rounds=args.rounds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("batch", 8), ("channels", 64), ("size", 56), ("depth", 6), ("kernel", 3), ("rounds", 15)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--network", help="of torchvision.models, with random weights, in place of the six blocks")
    parser.add_argument("--forward", action="store_true", help="a forward alone, of an input that needs no gradient")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of both too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a ratio is above its bound")
    args = parser.parse_args(arguments)
    if args.network and (why := missing("torchvision")):
        parser.error(f"--network: {why}")
    torch.set_num_threads(args.threads)
    shape = f"{args.batch}x{3 if args.network else args.channels}x{args.size}x{args.size}"
    blocks = f"{args.depth} x (conv {args.kernel}x{args.kernel} + BatchNorm + ReLU)"
    step = "forward" if args.forward else "forward and backward"
    print(f"torch {torch.__version__}, freezekit {fk.__version__}, CPU, {args.threads} thread(s), {args.dtype}")
    print(f"{args.network or blocks}, frozen, {shape}, {step}")
    failed = False
    for layout, bound in BOUNDS.items():
        timed = measure(layout, args)
        for name in timed.seconds:
            ratio = timed.ratio(name, "stock")
            print(
                f"{layout:14} {name:15} {timed.time(name).median * 1e3:8.2f} ms  {ratio.median:6.3f} of stock "
                f"± {ratio.relative * 100:.0f}%",
                flush=True,
            )
        failed |= timed.ratio("fused", "stock").median > bound
        failed |= args.compile and timed.ratio("fused", "compiled stock").median > 1
    return 1 if args.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
