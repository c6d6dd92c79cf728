"""Probes of what csrc/kernels/ptx_sm90.h wraps for sm_90a: mbarriers, bulk tensor copies, wgmma.

Shared memory is compared as bytes: rows of 128, whose chunk c of 16 bytes is at slot c ^ (row % 8) (PTX ISA,
"Swizzling modes"). Descriptors are core/shared_tile.h's; a wrong one gives a wrong product.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from .fragments import rounded
from .probe import Array, Arrays, Launch, Probe
from .sm80 import cancelling, random

DTYPES = {"tf32": 0, "f16": 2, "bf16": 3}  # as csrc/core/problem.h numbers them
ROW = 128


def storage(kind: str, values: Array) -> Array:
    """Values as memory holds them, in 16- or 32-bit words."""
    single = np.ascontiguousarray(values, np.float32)
    if kind == "tf32":
        return single.view(np.uint32)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.from_numpy(single).to(dtype).view(torch.int16).numpy().view(np.uint16)


def swizzled(rows: Array) -> Array:
    """(rows, 128 bytes) as a copy lays them."""
    chunks = rows.reshape(-1, 8, 16)
    out = np.empty_like(chunks)
    for row in range(len(chunks)):
        for chunk in range(8):
            out[row, chunk ^ row % 8] = chunks[row, chunk]
    return out.reshape(-1, ROW)


def _mbarrier() -> Probe:
    """Two warps hand a tile back and forth: what was written before an arrival is seen after the wait for it."""
    rounds = 9

    def run(launch: Launch, of: Arrays) -> Arrays:
        seen = np.zeros((rounds, 32), np.int32)
        launch("mbarrier", rounds, seen)
        return {"seen": seen}

    def expected(of: Arrays) -> Arrays:
        return {"seen": (100 * np.arange(rounds)[:, None] + np.arange(31, -1, -1)).astype(np.int32)}

    return Probe("mbarrier", dict, run, expected, needs=90)


def _copy_tile(kind: str, rank: int, name: str, at: tuple[int, int, int]) -> Probe:
    """A box of 16 rows; what is outside of the tensor comes as zeros."""
    values, rows = ROW // (4 if kind == "tf32" else 2), 16
    size = (values + 32, 24, 3 if rank == 3 else 1)

    def inputs() -> Arrays:
        made = random(4).randint(-64, 65, size[::-1])
        return {"tensor": storage(kind, made)}

    def run(launch: Launch, of: Arrays) -> Arrays:
        out = np.zeros((rows, ROW), np.uint8)
        launch("copy_tile", DTYPES[kind], of["tensor"].copy(), rank, *size, rows, *at, out)
        return {"shared": out}

    def expected(of: Arrays) -> Arrays:
        box = np.zeros((rows, values), of["tensor"].dtype)
        x, y, z = at
        for row in range(rows):
            for column in range(values):
                if 0 <= y + row < size[1] and 0 <= x + column < size[0] and 0 <= z < size[2]:
                    box[row, column] = of["tensor"][z, y + row, x + column]
        return {"shared": swizzled(box.view(np.uint8))}

    return Probe(f"copy_tile_{kind}_{rank}d_{name}", inputs, run, expected, needs=90)


def _copy_rounds_tf32() -> Probe:
    """float to tf32 on its way: 10 bits of mantissa, to nearest even."""

    def inputs() -> Arrays:
        bits = np.array([0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F801001, 0xBF801000, 0x00000000], np.uint32)
        return {"tensor": np.resize(bits, (16, 32))}

    def run(launch: Launch, of: Arrays) -> Arrays:
        out = np.zeros((16, ROW), np.uint8)
        launch("copy_tile", DTYPES["tf32"], of["tensor"].copy(), 2, 32, 16, 1, 16, 0, 0, 0, out)
        return {"shared": out}

    def expected(of: Arrays) -> Arrays:
        bits = of["tensor"].astype(np.uint64)
        nearest = (bits + 0xFFF + (bits >> 13 & 1)) & ~np.uint64(0x1FFF)
        return {"shared": swizzled(nearest.astype(np.uint32).view(np.uint8))}

    return Probe("copy_tile_rounds_tf32", inputs, run, expected, needs=90)


def _copy_changes_nan() -> Probe:
    """A map of tf32 has one NaN, without sign and payload (a report, docs/hardware.md); infinities stay."""

    def inputs() -> Arrays:
        bits = np.array([0x7FC00000, 0xFFC00001, 0x7F800001, 0x7FFFFFFF, 0x7F800000, 0xFF800000], np.uint32)
        return {"tensor": np.resize(bits, (16, 32))}

    def run(launch: Launch, of: Arrays) -> Arrays:
        out = np.zeros((16, ROW), np.uint8)
        launch("copy_tile", DTYPES["tf32"], of["tensor"].copy(), 2, 32, 16, 1, 16, 0, 0, 0, out)
        return {"shared": out}

    def expected(of: Arrays) -> Arrays:
        bits = np.where(of["tensor"] & 0x7FFFFF, np.uint32(0x7FFFE000), of["tensor"])
        return {"shared": swizzled(bits.astype(np.uint32).view(np.uint8))}

    return Probe("copy_tile_nan_tf32", inputs, run, expected, needs=90)


def _copy_im2col(name: str, stride: int, start: tuple[int, int, int], offset: tuple[int, int]) -> Probe:
    """Pixels of a padded 3x3 filter's box: w fastest, then h, then images; `start` is (w, h, n), `offset` (w, h)."""
    n, h, w, c, pixels, lower = 2, 7, 6, 64, 24, -1
    upper = -1  # size - 1 + upper is the last pixel of the box: outputs of a padded filter of 3

    def inputs() -> Arrays:
        return {"x": storage("bf16", random(5).randint(-64, 65, (n, h, w, c)))}

    def run(launch: Launch, of: Arrays) -> Arrays:
        out = np.zeros((pixels, ROW), np.uint8)
        box = (lower, upper, stride, pixels)
        launch("copy_im2col", DTYPES["bf16"], of["x"].copy(), n, h, w, c, *box, 0, *start, *offset, out)
        return {"shared": out}

    def expected(of: Arrays) -> Arrays:
        walk = [
            (image, row, column)
            for image in range(n)
            for row in range(lower, h + upper, stride)
            for column in range(lower, w + upper, stride)
        ]
        first = walk.index((start[2], start[1], start[0]))
        rows = np.zeros((pixels, c), np.uint16)
        for i, (image, row, column) in enumerate(walk[first : first + pixels]):
            y, x = row + offset[1], column + offset[0]
            if 0 <= y < h and 0 <= x < w:
                rows[i] = of["x"][image, y, x]
        return {"shared": swizzled(rows.view(np.uint8))}

    return Probe(f"copy_im2col_{name}", inputs, run, expected, needs=90)


def _wgmma(kind: str, columns: int, mn_major: bool, values: str = "integers") -> Probe:
    """64 x `columns`, a row of 128 bytes deep (64 MN-major): four instructions and their descriptors.

    `values` are small "integers", "reals", or "sums" of terms that cancel; all but integers within mma's bound.
    """
    depth = 64 if mn_major else ROW // (4 if kind == "tf32" else 2)

    def inputs() -> Arrays:
        r = random(6)
        if values == "sums":
            return {"a": rounded(kind, cancelling(64, depth)), "b": rounded(kind, np.full((depth, columns), 2.0**9))}
        make = r.standard_normal if values == "reals" else lambda shape: r.randint(-4, 5, shape).astype(np.float64)
        return {"a": rounded(kind, make((64, depth))), "b": rounded(kind, make((depth, columns)))}

    def run(launch: Launch, of: Arrays) -> Arrays:
        a, b = (of["a"].T, of["b"]) if mn_major else (of["a"], of["b"].T)
        registers = np.full((128, columns // 2), np.nan, np.float32)
        launch("wgmma", DTYPES[kind], int(mn_major), columns, storage(kind, a), storage(kind, b), registers)
        thread, i = np.meshgrid(np.arange(128), np.arange(columns // 2), indexing="ij")
        lane = thread % 32
        d = np.full((64, columns), np.nan, np.float32)
        d[16 * (thread // 32) + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = registers
        return {"d": d}

    def expected(of: Arrays) -> Arrays:
        return {"d": (of["a"].astype(np.float64) @ of["b"].astype(np.float64)).astype(np.float32)}

    def bound(of: Arrays) -> Arrays:
        """As for mma (sm80.py)."""
        terms = np.abs(of["a"]) @ np.abs(of["b"])
        return {} if values == "integers" else {"d": 2 * (depth + 1) * 2.0**-24 * terms}

    name = f"wgmma_{kind}_n{columns}{'_mn_major' if mn_major else ''}_{values}"
    return Probe(name, inputs, run, expected, bound, needs=90)


@functools.cache
def probes() -> tuple[Probe, ...]:
    """All of them."""
    kinds = tuple(DTYPES)
    return (
        _mbarrier(),
        *(_copy_tile(kind, 2, "inside", (8, 4, 0)) for kind in kinds),
        _copy_tile("bf16", 2, "before", (-8, -3, 0)),
        _copy_tile("bf16", 2, "beyond", (48, 12, 0)),
        _copy_tile("bf16", 3, "inside", (16, 5, 2)),
        _copy_tile("bf16", 3, "beyond", (0, 20, 1)),
        _copy_rounds_tf32(),
        _copy_changes_nan(),
        _copy_im2col("stride_1", 1, (-1, -1, 0), (0, 0)),
        _copy_im2col("last_tap", 1, (2, 4, 0), (2, 2)),
        _copy_im2col("stride_2", 2, (-1, 1, 0), (1, 2)),
        *(_wgmma(kind, columns, False) for kind in kinds for columns in (64, 128, 256)),
        *(_wgmma(kind, columns, True) for kind in kinds if kind != "tf32" for columns in (64, 128)),
        *(_wgmma(kind, 128, False, values) for values in ("reals", "sums") for kind in kinds),
    )
