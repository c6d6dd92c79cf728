"""What only the emulator shows of the ptx:: wrappers: counters, and copies that land late.

tests/conformance holds each wrapper to the PTX ISA, here and on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.conformance.fragments import KINDS, fragments

from .probe import counters, launch, settings


@pytest.mark.parametrize("kind", KINDS)
def test_an_mma_is_counted_once_a_warp(kind: str) -> None:
    zeros = np.zeros((16, 16))
    with settings():
        launch("mma", KINDS[kind], *fragments(kind, zeros, zeros, zeros))
        assert counters()["mma"] == 1


def test_lanes_without_a_row_are_not_asked_for_one() -> None:
    """The addresses of lanes 8 and up are outside of shared memory; one matrix has no rows there."""
    offsets = np.full(32, 1 << 20, np.int32)
    offsets[:8] = np.arange(8) * 16
    tile, found = np.arange(64, dtype=np.uint16), np.empty((32, 1), np.uint32)
    launch("ldmatrix", 1, False, tile, tile.nbytes, offsets, found)
    assert found[31, 0] == 62 | 63 << 16


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
