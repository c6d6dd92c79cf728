"""What `enable(precision=)` keeps and costs beside stock, exact savings and checkpoints, and how a net trains with it.

    python -m bench.lossy [--rounds 15] [--steps 400]

Networks are frozen, and their input learns: blocks as transformers have them (layer norm, Linear, GELU, Linear, a sum),
and as EfficientNet has them (1x1, depthwise, squeeze-and-excitation, 1x1, each with a frozen batch norm, SiLU between).
`enabled` keeps exact tensors. `checkpoint` is `enabled` as well, and runs each block's forward pass again; of the
transformer's, the first Linear and GELU alone. Bytes are counted from allocations.

Then an adapter beside each of a net's frozen layers learns to fit random labels, by the same steps from the same start.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from bench.memory import bytes_kept
from bench.timing import HostClock, interleave

SIDES = {"stock": None, "enabled": None, "int8": "int8", "int4": "int4", "checkpoint": None}
again = partial(checkpoint, use_reentrant=False)


class Transformer(nn.Module):
    def __init__(self, width: int = 384) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.last = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def grown(self, x: Tensor) -> Tensor:
        return F.gelu(self.first(x))

    def forward(self, x: Tensor, checkpointed: bool = False) -> Tensor:
        h = self.norm(x)
        return x + self.last(again(self.grown, h) if checkpointed else self.grown(h))


class Inverted(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        wide = 6 * width
        self.up, self.down = nn.Conv2d(width, wide, 1, bias=False), nn.Conv2d(wide, width, 1, bias=False)
        self.each = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (wide, wide, width))
        self.squeeze, self.excite = nn.Conv2d(wide, width // 4, 1), nn.Conv2d(width // 4, wide, 1)

    def inside(self, x: Tensor) -> Tensor:
        x = F.silu(self.norms[0](self.up(x)))
        x = F.silu(self.norms[1](self.each(x)))
        gate = self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.norms[2](self.down(x * gate))

    def forward(self, x: Tensor, checkpointed: bool = False) -> Tensor:
        return x + (again(self.inside, x) if checkpointed else self.inside(x))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformer": (Transformer, (2, 256, 384)),
    "efficientnet": (Inverted, (4, 24, 28, 28)),
}


def compare(name: str, rounds: int) -> None:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    blocks = nn.ModuleList(make() for _ in range(3)).eval().requires_grad_(False)
    x = torch.randn(size, requires_grad=True)

    def run(side: str, x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x, side == "checkpoint")
        return x

    def switch(side: str) -> fk.enabled:
        return fk.enabled(SIDES[side])

    def step(side: str) -> Tensor:
        return torch.autograd.grad(run(side, x * 1).square().mean(), x)[0]

    kept, found = {}, {}
    for side in SIDES:
        if side == "stock":
            kept[side], found[side] = bytes_kept(partial(run, side), x), step(side)
            continue
        with switch(side):
            kept[side], found[side] = bytes_kept(partial(run, side), x), step(side)
    within = {side: partial(switch, side) for side in SIDES if side != "stock"}
    times = interleave({side: partial(step, side) for side in SIDES}, clock=HostClock(), rounds=rounds, within=within)
    print(f"\n{name}: kept by stock {kept['stock'] / 2**20:.2f} MiB")
    print(
        f"{'':12} {'kept':>6} {'time':>6} {'[spread]':>14} {'error of dx':>12} {'ns per byte saved beside enabled':>34}"
    )
    for side in SIDES:
        ratio = times.ratio(side, "stock")
        error = ((found[side] - found["stock"]).norm() / found["stock"].norm()).item()
        more = times.time(side).median - times.time("enabled").median
        saved = kept["enabled"] - kept[side]
        cost = f"{more / saved * 1e9:34.3f}" if saved > 0 else ""
        spread = f"[{ratio.low:.3f} {ratio.high:.3f}]"
        print(f"{side:12} {kept[side] / kept['stock']:6.2f} {ratio.median:6.3f} {spread:>14} {error:12.2e} {cost}")


class Adapted(nn.Module):
    """A frozen Linear and a low-rank one beside it that learns."""

    def __init__(self, inputs: int, outputs: int, rank: int = 8) -> None:
        super().__init__()
        self.frozen = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


def train(precision: str | None, activation: Callable[[], nn.Module], steps: int, seed: int) -> tuple[float, float]:
    """The loss after a quarter of the steps, and after all."""
    torch.manual_seed(seed)
    sizes = [32, 128, 128, 128, 8]
    layers = [layer for pair in pairwise(sizes) for layer in (Adapted(*pair), activation())]
    model = nn.Sequential(*layers[:-1])
    x, labels = torch.randn(256, 32), torch.randint(0, 8, (256,))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    with fk.enabled(precision):
        for _ in range(steps + 1):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
    return losses[steps // 4], losses[steps]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Derivatives in few bits beside stock, exact savings and checkpoints.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=400)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in NETWORKS:
        compare(name, asked.rounds)
    seeds = range(5)
    print(f"\nloss, median and range of {len(seeds)} seeds, before training some {math.log(8):.2f}")
    print(f"{'':12} {f'{asked.steps // 4} steps of Adam':>24} {f'{asked.steps} steps':>24}")
    for activation in (nn.GELU, nn.SiLU):
        for precision in (None, "int8", "int4"):
            losses = zip(*(train(precision, activation, asked.steps, seed) for seed in seeds), strict=True)
            shown = [f"{statistics.median(each):.4f} [{min(each):.4f} {max(each):.4f}]" for each in losses]
            name = f"{activation.__name__}, {precision or 'exact'}"
            print(f"{name:12} {shown[0]:>24} {shown[1]:>24}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
