"""Convolutions on sm_90: CUTLASS's maps and copies beside those of the Hopper kernels, a problem at a time.

CUTLASS's host code talks to a driver that only takes notes, and its producer's coordinates are walked on the CPU. They
go two ways: the emulator copies by them, which must bring what the convolution needs; and the kernels, run in the
emulator with every copy noted, must ask for the same. Epilogues play no part.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tests.emulator.build import Planted

from . import nvidia
from .comparison import Comparison, Found
from .emulated import Array, call, library
from .layouts import Wgmma
from .records import COPY, Map, Problem

ROOM = 1 << 16  # copies of the largest plan
ROWS, PANEL = 128, 64  # of an output tile; positions, or channels, of a copy of wgrad
# Columns of the Hopper kernels' output tiles, in the order of their configs (kHopperTiles).
COLUMNS = (256, 128, 64)
FARTHEST = 254  # that a tap may read beyond its box
QUICK = 128  # what `make test` compares: compiling CUTLASS's kernels takes long


@dataclass(frozen=True)
class Plan:
    """`gathered` are im2col copies of the activation or its gradient, `other` the tiled ones of filter or dy."""

    gathered_map: Map
    gathered: Array
    other_map: Map
    other: Array


@functools.cache
def of_cutlass(problem: Problem, columns: int) -> Plan:
    """CUTLASS's plan at a tile of so many columns."""
    maps, counts, copies = (Map * 2)(), (ctypes.c_int * 2)(), np.zeros(ROOM, COPY)
    given = (problem.as_record(), columns, maps, copies.ctypes.data_as(ctypes.c_void_p), ROOM, counts)
    library_of = nvidia.library("cutlass.cpp" if columns == QUICK else "cutlass_tiles.cpp")
    assert library_of.cutlass_plan(*given), f"CUTLASS refuses {problem} at {columns} columns"
    of_a, of_b = copies[: counts[0]], copies[counts[0] : counts[0] + counts[1]]
    return Plan(maps[1], of_b, maps[0], of_a) if problem.op == "wgrad" else Plan(maps[0], of_a, maps[1], of_b)


def of_kernel(problem: Problem, columns: int, planted: Planted) -> Plan | None:
    """The plan of the Hopper kernel with so many columns; None if its launch failed."""
    maps, map_count, copy_count = (Map * 5)(), ctypes.c_int(), ctypes.c_int()
    copies = np.zeros(ROOM, COPY)
    given = (problem.as_record(), COLUMNS.index(columns), maps, ctypes.byref(map_count))
    taken = library(planted).truth_plan(*given, copies.ctypes.data_as(ctypes.c_void_p), ROOM, ctypes.byref(copy_count))
    assert taken, f"the Hopper kernels do not take {problem}"
    if taken < 0:
        return None
    assert map_count.value == 2, "one map for each operand"
    copies = copies[: copy_count.value]
    # The filter's maps have three dimensions; dy's of a wgrad, and a pointwise activation's, are matrices.
    gathers = [bool(m.im2col) or (problem.op != "wgrad" and m.rank == 2) for m in maps[:2]]
    assert sorted(gathers) == [False, True]
    gathered, other = gathers.index(True), gathers.index(False)
    return Plan(maps[gathered], copies[copies["map"] == gathered], maps[other], copies[copies["map"] == other])


def gathered_size(problem: Problem) -> tuple[int, int, int]:
    """H, W and C of the tensor that is gathered: x, or dy of a dgrad."""
    return (*problem.out, problem.k) if problem.op == "dgrad" else (problem.h, problem.w, problem.c)


def needed(problem: Problem, columns: int, copy: Array, values: int, tensor: Array) -> Array:
    """(pixels, values) that the convolution needs of a copy of CUTLASS's, by its tile, step and place in the stage."""
    h, w, c = gathered_size(problem)
    height, width = problem.out if problem.op != "dgrad" else (problem.h, problem.w)
    if problem.op == "wgrad":
        tiles = -(-c // columns)
        panel = copy["to"] // (PANEL * 128)
        tap, channel = copy["tile"] // tiles, copy["tile"] % tiles * columns + panel * PANEL
        position = copy["step"] * PANEL + np.arange(PANEL)
    else:
        blocks = -(-c // values)
        tap, channel = copy["step"] // blocks, copy["step"] % blocks * values
        position = copy["tile"] * ROWS + np.arange(ROWS)
    r, s = tap // problem.s, tap % problem.s
    q, p, n = position % width, position // width % height, position // width // height
    (pad_h, pad_w), (stride_h, stride_w), (dilation_h, dilation_w) = problem.pad, problem.stride, problem.dilation
    if problem.op == "dgrad":  # of unit stride
        i, j = p + pad_h - r * dilation_h, q + pad_w - s * dilation_w
    else:
        i, j = p * stride_h - pad_h + r * dilation_h, q * stride_w - pad_w + s * dilation_w
    channels = channel + np.arange(values)
    inside = ((n < problem.n) & (i >= 0) & (i < h) & (j >= 0) & (j < w))[:, None] & (channels < c)
    at = np.ix_(np.arange(len(n)), np.arange(values))
    found = np.zeros((len(n), values), tensor.dtype)
    pixel = tensor[np.minimum(n, problem.n - 1), np.clip(i, 0, h - 1), np.clip(j, 0, w - 1)]
    found[at] = pixel[:, np.minimum(channels, c - 1)]
    return np.where(inside, found, 0)


def compare_walk(problem: Problem, columns: int, planted: Planted) -> Found:
    """Elements that the emulator copies by CUTLASS's map and coordinates, beside those that the convolution needs."""
    plan = of_cutlass(problem, columns)
    h, w, c = gathered_size(problem)
    size = problem.n * h * w * c
    # No two neighbours alike, never zero, and exact in tf32.
    ids = np.arange(size, dtype=np.uint64) * 2654435761 >> 3
    numbers = (ids & 0x1FF) << 13 | 0x3F800000 if problem.f32 else (ids & 0x7FFF) | 1
    tensor = aligned(numbers.astype(np.uint32 if problem.f32 else np.uint16)).reshape(problem.n, h, w, c)
    values, pixels = 128 // tensor.itemsize, int(plan.gathered_map.pixels)
    places = Wgmma("tf32" if problem.f32 else "bf16", False, 64).tiles()[0][:pixels] // tensor.itemsize
    differ = of = 0
    for copy in plan.gathered:
        if copy["at"][3] >= problem.n:
            continue  # the rest of a last tile, which begins past the last image
        out = np.zeros(pixels * values, tensor.dtype)
        record = np.array([copy])
        refused = call(planted, "truth_im2col", int(problem.f32), tensor, ctypes.byref(plan.gathered_map), record, out)
        expected = needed(problem, columns, copy, values, tensor)
        differ += expected.size if refused else int((out[places] != expected).sum())
        of += expected.size
    return Found(differ, of)


def aligned(array: Array) -> Array:
    """The same values at a multiple of 16 bytes, as a map wants them."""
    memory = np.empty(array.nbytes + 16, np.uint8)
    first = -memory.ctypes.data % 16
    moved = memory[first : first + array.nbytes].view(array.dtype)
    moved[:] = array
    return moved


def gathers(problem: Problem, plan: Plan) -> set[tuple[int, ...]]:
    """Where the copies that bring something begin, and their offsets; a plain matrix's as those of its pixels."""
    h, w, c = gathered_size(problem)
    found = set()
    for copy in plan.gathered:
        channel, column, row, image = copy["at"].tolist()
        if not plan.gathered_map.im2col:
            position = column
            column, row, image = position % w, position // w % h, position // w // h
        if channel < c and image < problem.n:
            found.add((channel, column, row, image, *copy["offset"].tolist()))
    return found


def rows(plan: Plan, size: int) -> set[tuple[int, ...]]:
    """Of each tiled copy that brings something: the offsets in bytes of its rows of 128, in order; -1 lies outside."""
    of = plan.other_map
    found = set()
    for copy in plan.other:
        at = copy["at"].tolist()
        if at[0] >= of.sizes[0]:
            continue
        boxes = [range(at[i], at[i] + of.box[i]) for i in range(1, of.rank)]
        grid = np.stack(np.meshgrid(*boxes, indexing="ij"), -1)  # a later dimension is a slower one
        grid = grid.transpose(*reversed(range(len(boxes))), len(boxes)).reshape(-1, len(boxes))
        inside = np.all((grid >= 0) & (grid < np.array(of.sizes[1 : of.rank])), axis=1)
        offsets = np.where(inside, at[0] * size + grid @ np.array(of.strides[: of.rank - 1]), -1)
        if inside.any():
            found.add(tuple(offsets.tolist()))
    return found


def pixels_along(of: Map) -> list[int]:
    """How many pixels of the box a walk visits along w and h: corners of other places may hold the same pixels."""
    ends = (of.sizes[i + 1] + of.upper[i] - of.lower[i] for i in range(2))
    return [-(-end // of.traversal[i + 1]) for i, end in enumerate(ends)]


def by_the_driver(of: Map, f32: bool) -> Map:
    """What the launcher's code for a GPU hands to the driver for a map of the emulator's."""
    noted = Map()
    assert nvidia.driver().driver_map(int(f32), ctypes.byref(of), ctypes.byref(noted)), "a map that the driver refuses"
    return noted


CONSTANTS = ("swizzle", "interleave", "fill")
# What the emulator's map of a matrix or a filter, by which rows are compared, has in common with the driver's.
TILED = ("rank", "sizes", "strides", "box")
# As the driver numbers types. CUTLASS copies 16-bit values as integers, freezekit as what they are: the same bits.
TYPES = {1: "16 bits", 6: "16 bits", 9: "16 bits", 11: "tf32"}


def differing(problem: Problem, theirs: Plan, mine: Plan) -> Iterator[tuple[int, int]]:
    """(how many differ, of how many): coordinates, rows, arguments of maps."""
    ours, cutlass = gathers(problem, mine), gathers(problem, theirs)
    yield len(ours ^ cutlass), len(ours | cutlass)
    if problem.op != "dgrad":  # there CUTLASS reads the filter as it is and freezekit its transpose
        size = 4 if problem.f32 else 2
        ours, cutlass = rows(mine, size), rows(theirs, size)
        yield len(ours ^ cutlass), len(ours | cutlass)
    asked = by_the_driver(mine.gathered_map, problem.f32)
    if mine.gathered_map.im2col:
        arguments = asked.differing(theirs.gathered_map, "upper", "type")
        yield len(arguments) + (pixels_along(asked) != pixels_along(theirs.gathered_map)), len(Map._fields_)
    asked_for_other = by_the_driver(mine.other_map, problem.f32)
    for driver_s, emulator_s in ((asked, mine.gathered_map), (asked_for_other, mine.other_map)):
        if not emulator_s.im2col:
            yield len({*driver_s.differing(emulator_s)} & {*TILED}), len(TILED)
    for a, b in ((asked, theirs.gathered_map), (asked_for_other, theirs.other_map)):
        constants = sum(getattr(a, name) != getattr(b, name) for name in CONSTANTS)
        yield constants + (TYPES[a.type] != TYPES[b.type]), len(CONSTANTS) + 1


def compare_plan(problem: Problem, columns: int, planted: Planted) -> Found:
    """The kernel's copies and maps beside CUTLASS's."""
    theirs, mine = of_cutlass(problem, columns), of_kernel(problem, columns, planted)
    if mine is None:
        return Found(len(theirs.gathered), len(theirs.gathered), "the kernel's launch failed")
    counted = list(differing(problem, theirs, mine))
    return Found(*map(sum, zip(*counted)), f"{len(mine.gathered) + len(mine.other)} copies")


EVERY = tuple(
    problem
    for op in ("fprop", "dgrad", "wgrad")
    for problem in (
        Problem(op, 2, 9, 9, 64, 128, 3, 3, pad=(1, 1)),
        Problem(op, 2, 8, 12, 128, 64, 3, 3, pad=(1, 1)),
        Problem(op, 2, 8, 8, 64, 64, 3, 3, pad=(2, 2), dilation=(2, 2)),
        Problem(op, 1, 14, 11, 192, 64, 5, 3, pad=(2, 1)),
        Problem(op, 1, 5, 4, 320, 320, 2, 1),  # more than one tile of 256 columns
        Problem(op, 1, 1, 200, 64, 64, 1, 2, pad=(0, 127), dilation=(1, FARTHEST)),
        # The sizes of CUTLASS's own tests.
        Problem(op, 1, 8, 8, 64, 64, 1, 1),
        Problem(op, 1, 8, 8, 64, 16, 1, 1),
        Problem(op, 7, 8, 8, 64, 128, 1, 1),
        Problem(op, 2, 8, 8, 64, 128, 3, 3),
        Problem(op, 2, 8, 8, 32, 128, 3, 3, pad=(1, 1)),
        Problem(op, 2, 8, 8, 64, 128, 2, 5, pad=(1, 1), far_pad=(2, 2)),
    )
)
# CUTLASS's dgrad has unit strides alone.
STRIDED = tuple(
    problem
    for op in ("fprop", "wgrad")
    for problem in (
        Problem(op, 2, 9, 9, 64, 128, 3, 3, pad=(1, 1), stride=(2, 2)),
        Problem(op, 2, 8, 8, 64, 128, 3, 3, pad=(1, 1), stride=(2, 2)),  # the last corner is off the grid of strides
        Problem(op, 2, 8, 8, 64, 128, 3, 3, pad=(1, 1), stride=(3, 2), dilation=(1, 2)),
        Problem(op, 1, 32, 30, 64, 64, 7, 7, pad=(3, 3), stride=(2, 2)),
        Problem(op, 2, 7, 7, 64, 128, 2, 5, pad=(1, 1), far_pad=(0, 0), stride=(2, 3)),
        Problem(op, 2, 16, 16, 64, 128, 2, 5, pad=(1, 1), far_pad=(0, 0), dilation=(2, 3)),
        Problem(op, 2, 16, 15, 64, 128, 2, 5, pad=(1, 1), far_pad=(0, 0), stride=(2, 3), dilation=(2, 3)),
        Problem(op, 2, 8, 8, 64, 64, 1, 1, stride=(2, 2)),
    )
)
TF32 = tuple(
    replace(problem, f32=True)
    for problem in (
        Problem("fprop", 2, 9, 9, 32, 128, 3, 3, pad=(1, 1)),
        Problem("fprop", 2, 8, 8, 64, 128, 3, 3, pad=(1, 1), stride=(2, 2)),
    )
)
PROBLEMS = (*EVERY, *STRIDED, *TF32)
COMPARISONS = (
    # A tile's columns are those of the filter, but for a wgrad, where they are gathered.
    *(
        Comparison(
            f"{problem}: elements copied, 128x{columns}",
            functools.partial(compare_walk, problem, columns),
            quick=columns == QUICK,
        )
        for problem in PROBLEMS
        for columns in (COLUMNS if problem.op == "wgrad" else (QUICK,))
    ),
    # freezekit pads both sides alike.
    *(
        Comparison(
            f"{problem}: plans, 128x{columns}",
            functools.partial(compare_plan, problem, columns),
            quick=columns == QUICK,
        )
        for problem in PROBLEMS
        if problem.far_pad is None
        for columns in COLUMNS
    ),
)
