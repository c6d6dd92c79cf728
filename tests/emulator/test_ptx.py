"""Each ptx:: wrapper alone. Fragments are laid out by the PTX ISA's own formulas (sections 9.7.14.5.7, .8 and .15)."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from .probe import counters, launch, settings

LANES = range(32)
KINDS = {"bf16": 0, "f16": 1, "tf32": 2}


def element_a(kind: str, lane: int, i: int) -> tuple[int, int]:
    """(row, column) of A that element a_i of a lane's fragment holds."""
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return group + (0 if i in (0, 2) else 8), thread + (0 if i in (0, 1) else 4)
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (0 if i < 4 else 8)


def element_b(kind: str, lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return thread + 4 * i, group
    return thread * 2 + (i & 1) + (0 if i < 2 else 8), group


def element_c(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (0 if i < 2 else 8), (lane % 4) * 2 + (i & 1)


def registers(kind: str, values: np.ndarray) -> np.ndarray:
    """32 x elements of a fragment, as 32 x registers of 32 bits, lower element first."""
    if kind == "tf32":
        return values.astype(np.float32).view(np.uint32)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    bits = torch.from_numpy(values.astype(np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)
    return np.ascontiguousarray(bits).view(np.uint32)


def mma(kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A (16 x K) B (K x 8) + C (16 x 8) by one mma of the emulator."""
    per_lane = {"a": 4 if kind == "tf32" else 8, "b": 2 if kind == "tf32" else 4}
    of_a = np.array([[a[element_a(kind, lane, i)] for i in range(per_lane["a"])] for lane in LANES])
    of_b = np.array([[b[element_b(kind, lane, i)] for i in range(per_lane["b"])] for lane in LANES])
    of_c = np.array([[c[element_c(lane, i)] for i in range(4)] for lane in LANES], dtype=np.float32)
    launch("mma", KINDS[kind], registers(kind, of_a), registers(kind, of_b), of_c)
    d = np.empty((16, 8), np.float32)
    for lane in LANES:
        for i in range(4):
            d[element_c(lane, i)] = of_c[lane, i]
    return d


@pytest.mark.parametrize("kind", KINDS)
def test_mma_is_a_matrix_product(kind: str) -> None:
    rng, k = np.random.default_rng(0), 8 if kind == "tf32" else 16
    a, b = rng.integers(-8, 9, (16, k)), rng.integers(-8, 9, (k, 8))
    c = rng.integers(-100, 101, (16, 8))
    with settings():
        assert np.array_equal(mma(kind, a, b, c), a @ b + c)
        assert counters()["mma"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_mma_keeps_every_element_apart(kind: str) -> None:
    """One 1 in A and one in B at a time: any two places exchanged would show."""
    k = 8 if kind == "tf32" else 16
    for row in range(16):
        for inner in range(k):
            a, b = np.zeros((16, k)), np.arange(k * 8).reshape(k, 8) + 1.0
            a[row, inner] = 1
            expected = np.zeros((16, 8))
            expected[row] = b[inner]
            assert np.array_equal(mma(kind, a, b, np.zeros((16, 8))), expected)


def test_mma_tf32_ignores_the_low_13_bits() -> None:
    a, b = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
    a[0, 0], b[0, 0] = np.uint32(0x3F801FFF).view(np.float32), 1.0
    assert mma("tf32", a, b, np.zeros((16, 8)))[0, 0] == 1.0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix(matrices: int, transposed: bool) -> None:
    """Rows lie in shuffled places; lanes without a row give an address outside of shared memory, which is not read."""
    rng = np.random.default_rng(matrices)
    tile = rng.integers(0, 1 << 16, (32, 8)).astype(np.uint16)
    rows = rng.permutation(32).astype(np.int32)
    offsets = rows * 16
    offsets[8 * matrices :] = 1 << 20
    fragments = np.empty((32, matrices), np.uint32)
    launch("ldmatrix", matrices, transposed, tile, tile.nbytes, offsets, fragments)
    for m in range(matrices):
        matrix = tile[rows[8 * m : 8 * m + 8]]
        matrix = matrix.T if transposed else matrix
        for lane in LANES:
            low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
            assert fragments[lane, m] == int(low) | int(high) << 16


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_ldmatrix_feeds_mma(kind: str) -> None:
    """x4 of a row-major A and x2 with .trans of a row-major B are the fragments that mma takes."""
    rng = np.random.default_rng(3)
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    bits_a, bits_b = (np.ascontiguousarray(registers(kind, m)).view(np.uint16) for m in (a, b))
    lane = np.arange(32)
    of_a, of_b = np.empty((32, 4), np.uint32), np.empty((32, 2), np.uint32)
    offsets_a = (lane % 16 * 32 + lane // 16 * 16).astype(np.int32)
    launch("ldmatrix", 4, False, bits_a, bits_a.nbytes, offsets_a, of_a)
    launch("ldmatrix", 2, True, bits_b, bits_b.nbytes, (lane % 16 * 16).astype(np.int32), of_b)
    d = np.zeros((32, 4), np.float32)
    launch("mma", KINDS[kind], of_a, of_b, d)
    expected = a @ b
    assert all(d[lane, i] == expected[element_c(lane, i)] for lane in LANES for i in range(4))


@pytest.mark.parametrize(
    ("pitch", "phases"), [(16, 0), (32, 4), (64, 4), (128, 4), (144, 0), (80, 0)], ids=lambda v: str(v)
)
def test_bank_conflicts_are_counted(pitch: int, phases: int) -> None:
    """Eight rows at a pitch: 16 bytes apart they fill the 128 bytes of all banks, 32 apart two share each bank."""
    tile = np.zeros(32 * 144, np.uint8)
    with settings():
        launch(
            "ldmatrix",
            4,
            False,
            tile,
            tile.nbytes,
            (np.arange(32) * pitch).astype(np.int32),
            np.empty((32, 4), np.uint32),
        )
        assert counters()["ldmatrix_phases"] == 4
        assert counters()["ldmatrix_conflicts"] == phases


def test_rows_that_are_the_same_do_not_conflict() -> None:
    with settings():
        launch("ldmatrix", 4, False, np.zeros(16, np.uint8), 16, np.zeros(32, np.int32), np.empty((32, 4), np.uint32))
        assert counters()["ldmatrix_conflicts"] == 0


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_lands_no_sooner_than_it_must(size: int) -> None:
    global_bytes = np.arange(1, 3 * size + 1, dtype=np.uint8)
    first, second, zeroed = global_bytes[:size], global_bytes[size : 2 * size], np.zeros(size, np.uint8)
    nan = np.full(size, 0xFF, np.uint8)
    seen = np.empty((3, 3, size), np.uint8)
    with settings(cp_async="lazy"):
        launch("cp_async", size, global_bytes, seen)
        assert counters()["cp_async"] == 3
        assert counters()["global_read_bytes"] == 2 * size
    assert np.array_equal(seen, [[nan, nan, nan], [first, second, nan], [first, second, zeroed]])
    with settings(cp_async="eager"):
        launch("cp_async", size, global_bytes, seen)
    assert np.array_equal(seen, [[first, second, zeroed]] * 3)


def test_mixed_copies_land_by_chance() -> None:
    seen = np.empty((3, 3, 16), np.uint8)
    landed = set()
    for seed in range(2, 12):
        with settings(seed=seed, cp_async="mixed"):
            launch("cp_async", 16, np.ones(48, np.uint8), seen)
        landed.add(tuple((seen[0] != 0xFF).all(axis=1)))
    assert len(landed) > 2


def test_to_tf32_rounds_to_nearest_ties_away() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    bits = np.concatenate([bits, np.array([0x3F801000, 0xBF801000, 0x3F800FFF, 0x7F800000, 0xFF800000], np.uint32)])
    values, out = bits.view(np.float32), np.empty(len(bits), np.uint32)
    launch("to_tf32", values, out, ctypes.c_int64(len(bits)))
    finite = np.isfinite(values)
    wide = values[finite].astype(np.float64)
    unit = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(wide), 2.0**-149))), -126) - 10)
    expected = np.sign(wide) * np.floor(np.abs(wide) / unit + 0.5) * unit
    with np.errstate(over="ignore"):
        assert np.array_equal(out.view(np.float32)[finite], expected.astype(np.float32))
    assert np.array_equal(out[np.isinf(values)], bits[np.isinf(values)])
    assert np.isnan(out.view(np.float32)[np.isnan(values)]).all()
    assert (out[finite] & 0x1FFF == 0).all()
