"""Convolutions on sm_90: CUTLASS's maps and copies beside those of the Hopper kernels, a problem at a time.

CUTLASS's host code talks to a driver that only takes notes, and its producer's coordinates are walked on the CPU. They
go two ways: the emulator copies by them, which must bring what the convolution needs; and the kernels, run in the
emulator with every copy noted, must ask for the same. Epilogues play no part.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tests.emulator.build import Planted

from . import nvidia
from .comparison import Comparison, Found
from .emulated import Array, call, library
from .layouts import Wgmma
from .records import COPY, KINDS, Map, Problem

ROOM = 1 << 16  # copies of the largest plan
ROWS, PANEL = 128, 64  # of an output tile; positions, or channels, of a copy of wgrad
# Columns of the Hopper kernels' output tiles, in the order of their configs (kHopperTiles).
COLUMNS = (256, 128, 64)
FARTHEST = 254  # that a tap may read beyond its box
QUICK = 128  # what `make test` compares: compiling CUTLASS's kernels takes long


@dataclass(frozen=True)
class Plan:
    """`gathered` are im2col copies of the activation or its gradient, `other` the tiled ones of filter or dy.

    Those of one step meet in a product; `to` counts from where a stage has the operand. `transposed`: `other` is of a
    filter whose order is c, r, s, k.
    """

    gathered_map: Map
    gathered: Array
    other_map: Map
    other: Array
    transposed: bool = False


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
    tensors = (ctypes.c_int64 * 2)()
    given = (problem.as_record(), COLUMNS.index(columns), maps, ctypes.byref(map_count))
    noted = (copies.ctypes.data_as(ctypes.c_void_p), ROOM, ctypes.byref(copy_count), tensors)
    taken = library(planted).truth_plan(*given, *noted)
    assert taken, f"the Hopper kernels do not take {problem}"
    if taken < 0:
        return None
    assert map_count.value == 2, "one map for each operand"
    copies = copies[: copy_count.value]
    # The filter's maps have three dimensions; dy's of a wgrad, and a pointwise activation's, are matrices.
    gathers = [bool(m.im2col) or (problem.op != "wgrad" and m.rank == 2) for m in maps[:2]]
    assert sorted(gathers) == [False, True]
    gathered, other = gathers.index(True), gathers.index(False)
    maps[gathered].address -= tensors[0]
    maps[other].address -= tensors[1]
    find_steps(copies, columns)
    copies["to"][copies["map"] == (other if problem.op != "wgrad" else gathered)] -= ROWS * 128
    of_gathered, of_other = (copies[copies["map"] == i] for i in (gathered, other))
    return Plan(maps[gathered], of_gathered, maps[other], of_other, transposed=problem.op == "dgrad")


def find_steps(copies: Array, columns: int) -> None:
    """Numbers a kernel's steps, each of which fills another stage than the one before, and has `to` count in the stage.

    The lowest copy of all begins the first stage.
    """
    stage, copies["to"] = np.divmod(copies["to"] - copies["to"].min(), (ROWS + columns) * 128)
    new = (np.diff(stage) != 0) | (np.diff(copies["tile"]) != 0)
    copies["step"][1:] = np.cumsum(new)


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
    numbers = (ids & 0x1FF) << 13 | 0x3F800000 if problem.kind == "tf32" else (ids & 0x7FFF) | 1
    tensor = aligned(numbers.astype(np.uint32 if problem.kind == "tf32" else np.uint16)).reshape(problem.n, h, w, c)
    values, pixels = 128 // tensor.itemsize, int(plan.gathered_map.pixels)
    places = Wgmma(problem.kind, False, 64).tiles()[0][:pixels] // tensor.itemsize
    differ = of = 0
    for copy in plan.gathered:
        if copy["at"][3] >= problem.n:
            continue  # the rest of a last tile, which begins past the last image
        out = np.zeros(pixels * values, tensor.dtype)
        record = np.array([copy])
        kind = KINDS.index(problem.kind)
        refused = call(planted, "truth_im2col", kind, tensor, ctypes.byref(plan.gathered_map), record, out)
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


def gathers(problem: Problem, plan: Plan, copies: Array) -> list[tuple[int, ...]]:
    """Where the copies that bring something go and begin, and their offsets; a plain matrix's as those of its pixels.

    Not where those of a wgrad go: freezekit has several taps in a tile, CUTLASS one, which may fill half of it.
    """
    h, w, c = gathered_size(problem)
    found = []
    for copy in copies:
        channel, column, row, image = copy["at"].tolist()
        if not plan.gathered_map.im2col:
            position = column
            column, row, image = position % w, position // w % h, position // w // h
        if channel < c and image < problem.n:
            to = 0 if problem.op == "wgrad" else int(copy["to"])
            found.append((to, channel, column, row, image, *copy["offset"].tolist()))
    return found


def elements(of: Map, at: Array, size: int) -> Array:
    """(rows, values) that a tiled copy brings, as places of elements in the tensor; -1 lies outside."""
    axes = [np.arange(at[i], at[i] + of.box[i]) for i in range(of.rank)]
    steps = [1, *(stride // size for stride in of.strides[: of.rank - 1])]
    grid = np.meshgrid(*reversed(axes), indexing="ij")  # a later dimension is a slower one
    inside = np.all([(x >= 0) & (x < of.sizes[i]) for i, x in enumerate(reversed(grid))], axis=0)
    places = np.sum([x * step for x, step in zip(reversed(grid), steps)], axis=0)
    return np.where(inside, places, -1).reshape(-1, of.box[0])


def of_the_filter(problem: Problem, places: Array) -> Array:
    """Of places in the transposed filter of a dgrad, c, r, s, k: those in the filter, k, r, s, c."""
    rest, k = np.divmod(places, problem.k)
    c, tap = np.divmod(rest, problem.r * problem.s)
    return np.where(places < 0, -1, (k * problem.r * problem.s + tap) * problem.c + c)


def pieces(problem: Problem, plan: Plan, copies: Array) -> list[tuple[int, bytes]]:
    """Where the tiled copies that bring something go, and the places of their elements, row by row.

    Of a dgrad it is those of a tile together, as (k, c): CUTLASS reads the filter, by several copies, and freezekit its
    transpose, by one.
    """
    size = 4 if problem.kind == "tf32" else 2
    groups = [copies[i : i + 1] for i in range(len(copies))]
    if problem.op == "dgrad":
        groups = [np.sort(copies[copies["tile"] == tile], order="to") for tile in np.unique(copies["tile"])]
    found = []
    for group in groups:
        brought = [elements(plan.other_map, copy["at"], size) for copy in group]
        if plan.transposed:
            brought = [of_the_filter(problem, places).T for places in brought]
        places = np.hstack(brought)
        if (places >= 0).any():
            found.append((int(group["to"][0]), places.tobytes()))
    return found


def pairs(problem: Problem, plan: Plan) -> Counter[tuple[tuple[int, ...], tuple[int, bytes]]]:
    """How often each gather meets each piece of the other operand in a step of the reduction."""
    found: Counter[tuple[tuple[int, ...], tuple[int, bytes]]] = Counter()
    for step in range(max(plan.gathered["step"].max(), plan.other["step"].max()) + 1):
        gathered, other = (copies[copies["step"] == step] for copies in (plan.gathered, plan.other))
        found.update(itertools.product(gathers(problem, plan, gathered), pieces(problem, plan, other)))
    return found


def pixels_along(of: Map) -> list[int]:
    """How many pixels of the box a walk visits along w and h: corners of other places may hold the same pixels."""
    ends = (of.sizes[i + 1] + of.upper[i] - of.lower[i] for i in range(2))
    return [-(-end // of.traversal[i + 1]) for i, end in enumerate(ends)]


def by_the_driver(of: Map, planted: Planted) -> Map:
    """What the launcher's code for a GPU hands to the driver for a map of the emulator's."""
    noted = Map()
    driver = nvidia.driver(planted)
    assert driver.driver_map(ctypes.byref(of), ctypes.byref(noted)), "a map that the driver refuses"
    return noted


def steps_over(of: Map) -> list[int]:
    """Element strides that are not 1: maps of one tensor may differ in rank."""
    return [step for step in of.traversal[: of.rank] if step != 1]


CONSTANTS = ("swizzle", "interleave", "fill", "address")
# What a map of the emulator's lacks, or numbers otherwise. The driver's, made of it, is to be equal in all else: two
# arguments that were exchanged in both would else be exchanged back.
THE_DRIVER_S = ("type", "swizzle", "interleave", "fill")
# As the driver numbers types. CUTLASS copies 16-bit values as integers, freezekit as what they are: the same bits.
BITS = {1: "16 bits", 6: "16 bits", 9: "16 bits", 11: "tf32"}


def differing(problem: Problem, theirs: Plan, mine: Plan, planted: Planted) -> Iterator[tuple[int, int]]:
    """(how many differ, of how many): pairs of copies, arguments of maps."""
    ours, cutlass = pairs(problem, mine), pairs(problem, theirs)
    yield ((ours - cutlass) + (cutlass - ours)).total(), (ours | cutlass).total()
    asked, asked_for_other = (by_the_driver(of, planted) for of in (mine.gathered_map, mine.other_map))
    if mine.gathered_map.im2col:
        arguments = asked.differing(theirs.gathered_map, "upper", "type")
        yield len(arguments) + (pixels_along(asked) != pixels_along(theirs.gathered_map)), len(Map._fields_)
    else:  # a matrix, whose rows are the pixels in the order of CUTLASS's walk
        of = theirs.gathered_map
        matrix = (of.sizes[0], math.prod(of.sizes[1:]), of.strides[0], of.channels, of.pixels)
        asked_matrix = (*asked.sizes[:2], asked.strides[0], *asked.box[:2])
        yield sum(a != b for a, b in zip(asked_matrix, matrix)), len(matrix)
    for driver_s, emulator_s in ((asked, mine.gathered_map), (asked_for_other, mine.other_map)):
        yield len(driver_s.differing(emulator_s, *THE_DRIVER_S)), len(Map._fields_) - len(THE_DRIVER_S)
    kind = nvidia.library("cutlass.cpp").cutlass_type(KINDS.index(problem.kind))
    for a, b in ((asked, theirs.gathered_map), (asked_for_other, theirs.other_map)):
        constants = sum(getattr(a, name) != getattr(b, name) for name in CONSTANTS)
        yield constants + (steps_over(a) != steps_over(b)), len(CONSTANTS) + 1
        yield (a.type != kind) + (BITS.get(a.type) != BITS[b.type]), 2


def compare_plan(problem: Problem, columns: int, planted: Planted) -> Found:
    """The kernel's copies and maps beside CUTLASS's."""
    theirs, mine = of_cutlass(problem, columns), of_kernel(problem, columns, planted)
    if mine is None:
        return Found(len(theirs.gathered), len(theirs.gathered), "the kernel's launch failed")
    counted = list(differing(problem, theirs, mine, planted))
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
    replace(problem, kind="tf32")
    for problem in (
        Problem("fprop", 2, 9, 9, 32, 128, 3, 3, pad=(1, 1)),
        Problem("fprop", 2, 8, 8, 64, 128, 3, 3, pad=(1, 1), stride=(2, 2)),
    )
)
PROBLEMS = (*EVERY, *STRIDED, *TF32)
# Copies by another type of 16 bits: of pixels, of a matrix.
F16 = tuple(
    problem
    for op in ("fprop", "dgrad", "wgrad")
    for problem in (
        Problem(op, 2, 9, 9, 64, 128, 3, 3, pad=(1, 1), kind="f16"),
        Problem(op, 7, 8, 8, 64, 128, 1, 1, kind="f16"),
    )
)
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
        for problem in (*PROBLEMS, *F16)
        if problem.far_pad is None
        for columns in COLUMNS
    ),
)
