"""Bytes that each kernel asks of global memory, against every tensor moved once: python -m tests.kernels.traffic

Counted by the emulator (load_global, store_global and cp.async), so before any cache: what L1 and L2 save of it is not
seen here. Workspaces and the kernels that fill or read them count in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .emulated import OPERATORS, Problem, Settings, counters, run_conv2d
from .reference import operands

SETTINGS = Settings(sm=80, sm_count=108, allow_tf32=True)


def depthwise(size: int, stride: int) -> Problem:
    return Problem(
        n=1, c=32, k=32, h=56, w=56, r=size, s=size, pad=(size // 2,) * 2, stride=(stride, stride), groups=32
    )


PROBLEMS = {
    "1x1, 64 to 128": Problem(n=1, c=64, k=128, h=28, w=28, r=1, s=1, pad=(0, 0)),
    "3x3, 64 to 64": Problem(n=1, c=64, k=64, h=28, w=28),
    "3x3 stride 2, 64 to 128": Problem(n=1, c=64, k=128, h=28, w=28, stride=(2, 2)),
    "7x7 stride 2, 3 to 64": Problem(n=1, c=3, k=64, h=56, w=56, r=7, s=7, pad=(3, 3), stride=(2, 2)),
    "3x3, 4 groups of 16": Problem(n=1, c=64, k=64, h=28, w=28, groups=4),
    "3x3, 8 groups of 4": Problem(n=1, c=32, k=32, h=14, w=14, groups=8),
    **{f"depthwise {size}x{size} stride {stride}": depthwise(size, stride) for size in (3, 5, 7) for stride in (1, 2)},
}


def ratio(operator: str, problem: Problem) -> tuple[str, float]:
    """The kernel's name, and bytes moved over bytes of x, filter and y in bf16."""
    first, second = operands(operator, problem, torch.bfloat16, integers=True)
    with counters() as counted:
        _, kernel = run_conv2d(operator, problem, first, second, settings=SETTINGS)
    ideal = 2 * sum(a * b * c * d for a, b, c, d in problem.sizes.values())
    return kernel, (counted["global_read_bytes"] + counted["global_write_bytes"]) / ideal


def table() -> Iterator[str]:
    """The lines of the table in docs/kernels.md."""
    yield "| problem (bf16, N = 1) | operator | kernel | bytes / least |"
    yield "| --- | --- | --- | --- |"
    for name, problem in PROBLEMS.items():
        for operator in OPERATORS:
            kernel, moved = ratio(operator, problem)
            yield f"| {name} | {operator} | `{kernel}` | {moved:.2f} |"


if __name__ == "__main__":
    print("\n".join(table()))
