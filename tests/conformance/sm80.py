"""Probes of what csrc/kernels/ptx.h wraps for sm_80 and later: mma, ldmatrix, cp.async, cvt to tf32."""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from .fragments import KINDS, LANES, depth, fragment_c, fragments, matrix_c, registers, rounded
from .probe import Array, Arrays, Launch, Probe


def random(seed: int) -> np.random.RandomState:
    """RandomState's stream is the one that numpy promises never to change."""
    return np.random.RandomState(seed)


def mma(kind: str, launch: Launch, a: Array, b: Array, c: Array) -> Array:
    """A (16 x K) B (K x 8) + C (16 x 8) by one instruction."""
    of_a, of_b, of_d = fragments(kind, a, b, c)
    launch("mma", KINDS[kind], of_a, of_b, of_d)
    return matrix_c(of_d)


def _mma_integers(kind: str) -> Probe:
    """Small integers: every product and sum is exact."""

    def inputs() -> Arrays:
        r, k = random(0), depth(kind)
        return {"a": r.randint(-8, 9, (16, k)), "b": r.randint(-8, 9, (k, 8)), "c": r.randint(-100, 101, (16, 8))}

    return Probe(
        f"mma_{kind}_integers",
        inputs,
        lambda launch, of: {"d": mma(kind, launch, of["a"], of["b"], of["c"])},
        lambda of: {"d": (of["a"] @ of["b"] + of["c"]).astype(np.float32)},
    )


def _mma_places(kind: str) -> Probe:
    """One 1 in A at a time, and no two elements of B alike: any two places exchanged would show."""
    k = depth(kind)

    def one_hot(row: int, inner: int) -> Array:
        a = np.zeros((16, k))
        a[row, inner] = 1
        return a

    def run(launch: Launch, of: Arrays) -> Arrays:
        zero = np.zeros((16, 8))
        results = [mma(kind, launch, one_hot(row, inner), of["b"], zero) for row in range(16) for inner in range(k)]
        return {"d": np.stack(results)}

    def expected(of: Arrays) -> Arrays:
        products = [one_hot(row, inner) @ of["b"] for row in range(16) for inner in range(k)]
        return {"d": np.stack(products).astype(np.float32)}

    return Probe(f"mma_{kind}_places", lambda: {"b": np.arange(k * 8).reshape(k, 8) + 1.0}, run, expected)


def _mma_reals(kind: str) -> Probe:
    """Rounding: hardware adds in an order, and drops bits, that are not documented.

    K products and C are K + 1 terms; each addition may lose a unit of the last place of the largest magnitude passed
    through, and a truncated one twice a rounded one's.
    """
    k = depth(kind)

    def inputs() -> Arrays:
        r = random(1)
        return {"a": r.standard_normal((16, k)), "b": r.standard_normal((k, 8)), "c": r.standard_normal((16, 8))}

    def operands(of: Arrays) -> tuple[Array, Array, Array]:
        a, b = (rounded(kind, of[name]).astype(np.float64) for name in "ab")
        return a, b, of["c"].astype(np.float32).astype(np.float64)

    def expected(of: Arrays) -> Arrays:
        a, b, c = operands(of)
        return {"d": (a @ b + c).astype(np.float32)}

    def bound(of: Arrays) -> Arrays:
        a, b, c = operands(of)
        return {"d": 2 * (k + 1) * 2.0**-24 * (np.abs(a) @ np.abs(b) + np.abs(c))}

    return Probe(
        f"mma_{kind}_reals",
        inputs,
        lambda launch, of: {"d": mma(kind, launch, of["a"], of["b"], of["c"])},
        expected,
        bound,
    )


def cancelling(rows: int, k: int) -> Array:
    """Rows of products 2^24 and -2^24, in other places of each row, among ones: what order and rounding do most to.

    Each value is to be multiplied by 2^9.
    """
    a = np.full((rows, k), 2.0**-9)
    for row in range(rows):
        a[row, row % k], a[row, (row + 1 + row // k % (k - 1)) % k] = 2.0**15, -(2.0**15)
    return a


def _mma_sums(kind: str) -> Probe:
    """As reals, of terms that cancel; golden vectors then show the order and the bits that a GPU keeps."""
    k = depth(kind)

    def inputs() -> Arrays:
        return {"a": cancelling(16, k), "b": np.full((k, 8), 2.0**9), "c": np.zeros((16, 8))}

    return Probe(
        f"mma_{kind}_sums",
        inputs,
        lambda launch, of: {"d": mma(kind, launch, of["a"], of["b"], of["c"])},
        lambda of: {"d": (of["a"] @ of["b"]).astype(np.float32)},
        lambda of: {"d": 2 * (k + 1) * 2.0**-24 * (np.abs(of["a"]) @ of["b"])},
    )


def _mma_low_bits() -> Probe:
    """tf32 operands carry 13 bits that the instruction ignores."""

    def inputs() -> Arrays:
        a, b = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
        a[0, 0], b[0, 0] = np.uint32(0x3F801FFF).view(np.float32), 1.0
        return {"a": a, "b": b}

    def expected(of: Arrays) -> Arrays:
        return {"d": rounded("tf32", of["a"]) @ of["b"]}

    zero = np.zeros((16, 8))
    return Probe(
        "mma_tf32_low_bits", inputs, lambda launch, of: {"d": mma("tf32", launch, of["a"], of["b"], zero)}, expected
    )


def _mma_f16_subnormals() -> Probe:
    """fp16's subnormal numbers are numbers to the instruction: 2^-24 times 1 is not flushed to zero."""

    def inputs() -> Arrays:
        return {"a": np.full((16, 16), 2.0**-24), "b": np.ones((16, 8))}

    return Probe(
        "mma_f16_subnormals",
        inputs,
        lambda launch, of: {"d": mma("f16", launch, of["a"], of["b"], np.zeros((16, 8)))},
        lambda of: {"d": (of["a"] @ of["b"]).astype(np.float32)},
    )


def _ldmatrix(matrices: int, transposed: bool) -> Probe:
    """Rows are in shuffled places."""

    def inputs() -> Arrays:
        r = random(matrices)
        return {"tile": r.randint(0, 1 << 16, (32, 8)).astype(np.uint16), "rows": r.permutation(32).astype(np.int32)}

    def run(launch: Launch, of: Arrays) -> Arrays:
        found = np.empty((32, matrices), np.uint32)
        launch("ldmatrix", matrices, transposed, of["tile"].copy(), of["tile"].nbytes, of["rows"] * 16, found)
        return {"fragments": found}

    def expected(of: Arrays) -> Arrays:
        found = np.empty((32, matrices), np.uint32)
        for m in range(matrices):
            matrix = of["tile"][of["rows"][8 * m : 8 * m + 8]]
            matrix = matrix.T if transposed else matrix
            for lane in LANES:
                low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
                found[lane, m] = int(low) | int(high) << 16
        return {"fragments": found}

    return Probe(f"ldmatrix_x{matrices}{'_trans' if transposed else ''}", inputs, run, expected)


def _ldmatrix_feeds_mma(kind: str) -> Probe:
    """x4 of a row-major A and x2 with .trans of a row-major B are the fragments that mma takes."""

    def inputs() -> Arrays:
        r = random(3)
        return {"a": r.randint(-8, 9, (16, 16)), "b": r.randint(-8, 9, (16, 8))}

    def run(launch: Launch, of: Arrays) -> Arrays:
        bits_a, bits_b = (registers(kind, of[name]).view(np.uint16) for name in "ab")
        lane = np.arange(32)
        of_a, of_b = np.empty((32, 4), np.uint32), np.empty((32, 2), np.uint32)
        offsets_a = (lane % 16 * 32 + lane // 16 * 16).astype(np.int32)
        launch("ldmatrix", 4, False, bits_a, bits_a.nbytes, offsets_a, of_a)
        launch("ldmatrix", 2, True, bits_b, bits_b.nbytes, (lane % 16 * 16).astype(np.int32), of_b)
        of_d = fragment_c(np.zeros((16, 8)))
        launch("mma", KINDS[kind], of_a, of_b, of_d)
        return {"d": matrix_c(of_d)}

    return Probe(f"ldmatrix_feeds_mma_{kind}", inputs, run, lambda of: {"d": (of["a"] @ of["b"]).astype(np.float32)})


def _cp_async(size: int) -> Probe:
    """Two copies and one zero fill, a group each. What has not been waited for may or may not have landed."""

    def run(launch: Launch, of: Arrays) -> Arrays:
        seen = np.empty((3, 3, size), np.uint8)
        launch("cp_async", size, of["global"].copy(), seen)
        return {"after_wait_1": seen[1, :2], "after_wait_0": seen[2]}

    def expected(of: Arrays) -> Arrays:
        groups = of["global"].reshape(3, size).copy()
        groups[2] = 0
        return {"after_wait_1": groups[:2], "after_wait_0": groups}

    return Probe(f"cp_async_{size}", lambda: {"global": np.arange(1, 3 * size + 1, dtype=np.uint8)}, run, expected)


def _to_tf32() -> Probe:
    """10 bits of mantissa, to nearest, ties away from zero; infinities and NaN stay what they are."""

    def inputs() -> Arrays:
        bits = random(1).randint(0, 1 << 32, 1 << 12, dtype=np.uint64).astype(np.uint32)
        edges = [0x3F801000, 0xBF801000, 0x3F800FFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 1, 0x80000000]
        return {"bits": np.concatenate([bits, np.array(edges, np.uint32)])}

    def run(launch: Launch, of: Arrays) -> Arrays:
        out = np.empty(len(of["bits"]), np.uint32)
        launch("to_tf32", of["bits"].view(np.float32).copy(), out, ctypes.c_int64(len(out)))
        return {"out": out.view(np.float32)}

    def expected(of: Arrays) -> Arrays:
        values = of["bits"].view(np.float32)
        finite = np.isfinite(values)
        wide = np.where(finite, values, 0).astype(np.float64)
        unit = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(wide), 2.0**-149))), -126) - 10)
        with np.errstate(over="ignore"):
            nearest = (np.sign(wide) * np.floor(np.abs(wide) / unit + 0.5) * unit).astype(np.float32)
        return {"out": np.where(finite, nearest, values)}

    return Probe("to_tf32", inputs, run, expected)


@functools.cache
def probes() -> tuple[Probe, ...]:
    """All of them."""
    kinds = tuple(KINDS)
    return (
        *(make(kind) for make in (_mma_integers, _mma_places, _mma_reals, _mma_sums) for kind in kinds),
        _mma_low_bits(),
        _mma_f16_subnormals(),
        *(_ldmatrix(matrices, transposed) for matrices in (1, 2, 4) for transposed in (False, True)),
        *(_ldmatrix_feeds_mma(kind) for kind in kinds[:2]),
        *(_cp_async(size) for size in (4, 8, 16)),
        _to_tf32(),
    )
