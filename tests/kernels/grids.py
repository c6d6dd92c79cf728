"""What `select` makes of ResNet-50's layers on a large GPU, computed: python -m tests.kernels.grids

A cell is: tile, blocks of the grid over multiprocessors, and how even that is: the average number of blocks a
multiprocessor over the largest one. wgrad's split is in front, the bytes of its partial sums behind. Nothing is timed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.layer_lists import LayerShape, layers_of

from .emulated import OPERATORS, Problem, Selection, Settings, select

BATCH, TARGET = 128, Settings(sm=90, sm_count=132)


@dataclass(frozen=True)
class Grid:
    """The grid of one launch.

    Attributes:
        rounds: blocks over multiprocessors.
        useful: share of the tiles' area that is output.
    """

    selection: Selection
    blocks: int
    useful: float

    @property
    def rounds(self) -> float:
        return self.blocks / TARGET.sm_count

    @property
    def even(self) -> float:
        return self.rounds / -(-self.blocks // TARGET.sm_count)

    def __str__(self) -> str:
        tile = re.search(r"\d+x\d+", self.selection.kernel)
        split = f"{self.selection.split_k} x " if self.selection.split_k > 1 else ""
        sums = f", {self.selection.workspace / 2**20:.0f} MiB" if split else ""
        return f"{split}{tile and tile[0]}, {self.rounds:.2f}, {self.even:.2f}{sums}"


def problem_of(layer: LayerShape, batch: int = BATCH) -> Problem:
    return Problem(
        n=batch,
        c=layer.in_channels,
        k=layer.out_channels,
        h=layer.size,
        w=layer.size,
        r=layer.kernel,
        s=layer.kernel,
        pad=(layer.padding,) * 2,
        stride=(layer.stride,) * 2,
        groups=layer.groups,
    )


def grid(operator: str, problem: Problem, dtype: torch.dtype = torch.bfloat16) -> Grid:
    """Of a kernel whose name tells its tile: the direct and the implicit GEMM families."""
    chosen = select(operator, problem, dtype, TARGET)
    tile_rows, tile_columns = map(int, re.findall(r"(\d+)x(\d+)", chosen.kernel)[0])
    k, c = problem.k // problem.groups, problem.c // problem.groups
    copies = problem.groups
    if operator == "fprop":
        rows, columns = problem.n * problem.p * problem.q, k
    elif operator == "dgrad":  # every phase gets the grid of the largest one
        rows, columns = problem.n * -(-problem.h // problem.stride[0]) * -(-problem.w // problem.stride[1]), c
        copies *= problem.stride[0] * problem.stride[1]
    else:
        rows, columns = k, c * problem.r * problem.s
        copies *= chosen.split_k
    tiles = -(-rows // tile_rows) * -(-columns // tile_columns)
    return Grid(chosen, tiles * copies, rows * columns / (tiles * tile_rows * tile_columns))


def table() -> Iterator[str]:
    """The lines of the table in docs/kernels.md."""
    yield "| layer | fprop | dgrad | wgrad |"
    yield "| --- | --- | --- | --- |"
    for layer in layers_of("resnet50"):
        cells = [str(grid(operator, problem_of(layer))) for operator in OPERATORS]
        yield f"| {layer.shape} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))
