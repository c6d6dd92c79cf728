"""Fragments, tiles in shared memory, descriptors and products: the emulator and the kernels' functions beside CuTe.

The emulator is given operands that CuTe's layouts have placed, and what it gives back is read by CuTe's layouts.
Kernels that are right in the emulator (tests/kernels) are then right about these layouts too.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import numpy as np

from tests.conformance.fragments import registers
from tests.conformance.sm90 import storage
from tests.emulator.build import Planted

from . import nvidia
from .comparison import Comparison, Found
from .emulated import Array, call, library
from .records import KINDS

MOST = 1 << 16  # values of the largest table
STEPS = 4  # wgmmas along a tile, 128 bytes deep
A_BYTES = 128 * 128
HALF = 64 * 128  # bytes of a warpgroup's rows, or of a panel of 64 values by 64


def table(name: str, *arguments: int, dtype: type = np.int32) -> Array:
    """A table of CuTe's."""
    out = np.zeros(MOST, dtype)
    count = getattr(nvidia.library("cutlass.cpp"), name)(*arguments, out.ctypes.data_as(ctypes.c_void_p))
    assert count > 0, f"CuTe has no {name}{arguments}"
    return out[:count]


@functools.cache
def mma_table(kind: str, operand: int) -> tuple[Array, Array]:
    """(rows, columns) of the elements of a fragment, 32 lanes each: A's m and k, B's n and k, C's m and n."""
    flat = table("cute_mma", KINDS.index(kind), operand).reshape(32, -1)
    rows = 8 if operand == 1 else 16
    return flat % rows, flat // rows


def compare_mma(kind: str, planted: Planted) -> Found:
    """A has one column at a time, no two of whose rows are alike, and no two elements of B are."""
    depth = 8 if kind == "tf32" else 16
    b_n, b_k = mma_table(kind, 1)
    c_m, c_n = mma_table(kind, 2)
    b = np.ascontiguousarray(registers(kind, 1.0 + b_n + 8 * b_k))
    differ = of = 0
    for k in range(depth):
        a_m, a_k = mma_table(kind, 0)
        a, d = registers(kind, np.where(a_k == k, 1.0 + a_m, 0.0)), np.zeros((32, 4), np.float32)
        refused = call(planted, "probe_mma", KINDS.index(kind), np.ascontiguousarray(a), b, d)
        expected = (1 + c_m) * (1 + c_n + 8 * k)
        differ, of = differ + (d.size if refused else int((d != expected).sum())), of + d.size
    return Found(differ, of)


def compare_ldmatrix(matrices: int, transposed: bool, planted: Planted) -> Found:
    """Lanes point at shuffled rows; CuTe says whose row each bit of a fragment comes from."""
    given = 8 * matrices
    elements = np.random.RandomState(matrices).permutation(8 * given).astype(np.uint16)
    rows = np.zeros(32, np.int32)
    rows[:given] = np.random.RandomState(0).permutation(given)
    got = np.zeros((32, matrices), np.uint32)
    refused = call(planted, "probe_ldmatrix", matrices, transposed, elements, elements.nbytes, 16 * rows, got)
    source = table("cute_ldmatrix_rows", matrices, int(transposed)).reshape(32, -1)
    assert (source[:given, 0] == 128 * np.arange(given)).all(), "a lane's row is 128 bits of the source"
    bits = table("cute_ldmatrix", matrices, int(transposed)).reshape(32, -1)[:, ::16]
    expected = elements.reshape(given, 8)[rows[bits // 128], bits % 128 // 16]
    differ = expected.size if refused else int((got.view(np.uint16) != expected).sum())
    return Found(differ, expected.size)


@dataclass(frozen=True)
class Wgmma:
    """A wgmma whose operands are both K-major, or both MN-major."""

    kind: str
    mn_major: bool
    columns: int

    def __str__(self) -> str:
        return f"wgmma {self.kind} {'MN' if self.mn_major else 'K'}-major, 64x{self.columns}"

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return 4 if self.kind == "tf32" else 2

    @property
    def depth(self) -> int:
        """Of a tile along the reduction."""
        return 128 // self.size

    @property
    def key(self) -> tuple[int, int, int]:
        """As cute_layouts.h numbers them."""
        return KINDS.index(self.kind), int(self.mn_major), self.columns

    def tiles(self) -> tuple[Array, Array]:
        """Bytes at which CuTe has the elements (row or column, l) of A's 128 rows and of B."""
        flat = table("cute_tiles", *self.key)
        return flat[: 128 * self.depth].reshape(128, -1), flat[128 * self.depth :].reshape(self.columns, -1)

    def descriptors(self) -> tuple[Array, Array]:
        """CuTe's, of the steps: of A by both warpgroups, of B."""
        flat = table("cute_descriptors", *self.key, dtype=np.uint64)
        return flat[: 2 * STEPS].reshape(2, STEPS), flat[2 * STEPS :]


def compare_tiles(wgmma: Wgmma, planted: Planted) -> Found:
    """Where the kernels' copies put an element: rows of 128 bytes one after another, swizzled."""
    differ = of = 0
    for addresses in wgmma.tiles():
        row, depth = np.indices(addresses.shape)
        linear = row * 128 + depth * wgmma.size
        if wgmma.mn_major:
            linear = row // 64 * HALF + depth * 128 + row % 64 * wgmma.size
        swizzled = np.array([library(planted).truth_swizzled(at) for at in linear.ravel().tolist()]).reshape(
            linear.shape
        )
        differ, of = differ + int((swizzled != addresses).sum()), of + addresses.size
    return Found(differ, of)


def compare_descriptors(wgmma: Wgmma, planted: Planted) -> Found:
    """Those of every step. A leading offset leads to a second panel; where there is none, the field is not used."""
    of_a, of_b = wgmma.descriptors()

    def mine(tile: int) -> Array:
        steps = (library(planted).truth_descriptor(int(wgmma.mn_major), tile, HALF, s) for s in range(STEPS))
        return np.array(list(steps), np.uint64)

    everything, leading = np.uint64(2**64 - 1), np.uint64(0x3FFF << 16)
    of_one_panel = everything ^ leading if wgmma.mn_major else everything
    pairs = [(of_a[warpgroup], mine(warpgroup * HALF), of_one_panel) for warpgroup in range(2)]
    pairs.append((of_b, mine(0), of_one_panel if wgmma.columns == 64 else everything))
    differ = sum(int(((theirs ^ ours) & mask != 0).sum()) for theirs, ours, mask in pairs)
    unused = sum(int(((theirs ^ ours) & ~mask != 0).sum()) for theirs, ours, mask in pairs)
    return Found(differ, 3 * STEPS, f"{unused} in a leading offset that leads nowhere" if unused else "")


def compare_products(wgmma: Wgmma, planted: Planted) -> Found:
    """The emulator's product of CuTe's tiles by CuTe's descriptors, read by CuTe's layout of accumulators."""
    random = np.random.RandomState(1)
    a, b = (random.randint(-4, 5, (rows, wgmma.depth)).astype(np.float32) for rows in (128, wgmma.columns))
    at_a, at_b = wgmma.tiles()
    shared = np.zeros(A_BYTES + wgmma.columns * 128, np.uint8)
    words = shared.view(np.uint32 if wgmma.size == 4 else np.uint16)
    words[at_a // wgmma.size] = storage(wgmma.kind, a)
    words[(A_BYTES + at_b) // wgmma.size] = storage(wgmma.kind, b)
    of_a, of_b = wgmma.descriptors()
    of_b = of_b + np.uint64(A_BYTES >> 4)
    places = table("cute_wgmma_accumulators", wgmma.columns).reshape(128, -1)
    differ = of = 0
    for warpgroup in range(2):
        d = np.zeros((128, wgmma.columns // 2), np.float32)
        given = (*wgmma.key, shared, shared.nbytes, STEPS, np.ascontiguousarray(of_a[warpgroup]), of_b, d)
        refused = call(planted, "truth_wgmma", *given)
        expected = (a[64 * warpgroup : 64 * warpgroup + 64] @ b.T)[places % 64, places // 64]
        differ, of = differ + (d.size if refused else int((d != expected).sum())), of + d.size
    return Found(differ, of)


WGMMAS = (
    *(Wgmma("bf16", False, columns) for columns in (64, 128, 256)),
    *(Wgmma("bf16", True, columns) for columns in (64, 128)),
    *(Wgmma("f16", False, 128), Wgmma("f16", True, 256), Wgmma("tf32", False, 64), Wgmma("tf32", False, 256)),
)
COMPARISONS = (
    *(Comparison(f"mma {kind}: fragments", functools.partial(compare_mma, kind)) for kind in KINDS),
    *(
        Comparison(
            f"ldmatrix x{matrices}{'.trans' * transposed}", functools.partial(compare_ldmatrix, matrices, transposed)
        )
        for transposed in (False, True)
        for matrices in (1, 2, 4)
    ),
    *(Comparison(f"{w}: tiles in shared memory", functools.partial(compare_tiles, w)) for w in WGMMAS),
    *(Comparison(f"{w}: descriptors", functools.partial(compare_descriptors, w)) for w in WGMMAS),
    *(Comparison(f"{w}: products", functools.partial(compare_products, w)) for w in WGMMAS),
)
