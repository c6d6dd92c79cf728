"""What a lossy GELU would save and cost beside a checkpoint: time per byte that is kept no more.

    python -m bench.lossy [--rounds 15]

A frozen block, Linear(768, 3072) -> GELU -> Linear(3072, 768), whose input learns. `int8` keeps the derivative of GELU
in 8 bits in the place of its input, each way compiled to one kernel; the derivative lies in a known interval and
needs no scale per block. A checkpoint of the first layer and GELU runs those again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.memory import bytes_kept
from bench.timing import HostClock, interleave

LEAST, MOST = -0.12904, 1.12904  # of GELU's derivative
STEP = (MOST - LEAST) / 255


@torch.compile
def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its derivative in 8 bits."""
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    derivative = cdf + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * cdf, ((derivative - LEAST) * (1 / STEP) + 0.5).to(torch.uint8)


@torch.compile
def decode(dy: Tensor, code: Tensor) -> Tensor:
    return dy * (code * STEP + LEAST)


class Lossy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, code = encode(x)
        ctx.save_for_backward(code)
        return y

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Tensor:
        return decode(dy[0], *ctx.saved_tensors)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A lossy GELU beside a checkpoint.")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args(argv).rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    first, last = (nn.Linear(*sizes).requires_grad_(False) for sizes in ((768, 3072), (3072, 768)))
    x = torch.randn(512, 768, requires_grad=True)
    dy = torch.randn(512, 768)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "stock": lambda x: last(F.gelu(first(x))),
        "int8": lambda x: last(Lossy.apply(first(x))),
        "checkpoint": lambda x: last(checkpoint(lambda x: F.gelu(first(x)), x, use_reentrant=False)),
    }
    # A checkpoint keeps the block's input, which the layer before has kept in any case.
    kept = {name: bytes_kept(lambda x, call=call: call(x * 1), x) for name, call in calls.items()}  # type: ignore[misc]
    kept["checkpoint"] -= x.nbytes
    steps = {name: lambda call=call: torch.autograd.grad(call(x), x, dy) for name, call in calls.items()}
    times = interleave(steps, clock=HostClock(), rounds=rounds)
    (exact,), (lossy,) = steps["stock"](), steps["int8"]()
    print(f"error of dx: {((lossy - exact).norm() / exact.norm()).item():.2%}")
    for name in ("int8", "checkpoint"):
        more = times.time(name).median - times.time("stock").median
        saved = kept["stock"] - kept[name]
        print(
            f"{name}: {times.ratio(name, 'stock').median:.3f} of stock's time, {kept[name] / kept['stock']:.2f} of its"
        )
        print(f"  bytes, {more / saved * 1e9:.2f} ns per byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
