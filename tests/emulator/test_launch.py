"""Launching, scheduling, counting and failing, in this process: a failed launch says why and leaves nothing behind."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest

from .probe import counters, last_error, launch, library, settings

FAULTS = {
    "divergent_barrier": "meet at different __syncthreads",
    "missed_barrier": "deadlock: 31 threads wait at a __syncthreads.., 1 at a warp collective",
    "divergent_masks": "meet at different collectives: __syncwarp.. and __syncwarp.., masks",
    "missed_in_warp": "1 threads wait at a __syncthreads.., 15 at a warp collective, 0 at an mbarrier, 16 have ended",
    "lane_outside_mask": "__syncwarp.. by lane 16, which is not in its mask 0000ffff",
    "partial_mma": "mma.m16n8k16.bf16 by a warp that is not whole",
    "different_collectives": "meet at different collectives: __syncwarp.. and ldmatrix",
    "in_flight": "a thread ends with a cp.async that it has not waited for",
    "misaligned_copy": "cp.async of 8 bytes: an address is not a multiple of 8",
    "copy_outside_shared": "cp.async of 16 bytes does not write inside shared memory",
    "ldmatrix_outside_shared": "ldmatrix does not read inside shared memory",
    "misaligned_ldmatrix": "ldmatrix: an address is not a multiple of 16",
    "no_dynamic_shared": "dynamic shared memory, launched without any",
    "too_much_static_shared": "bytes of static shared memory, a block has 49152",
    "misaligned_load": "4 bytes accessed at an address that is not a multiple of it",
    "misaligned_store": "16 bytes accessed at an address that is not a multiple of it",
}


def triple(x: int, y: int = 1, z: int = 1) -> np.ndarray:
    return np.array([x, y, z], np.int32)


def order(grid: np.ndarray, block: np.ndarray) -> list[int]:
    out = np.full(int(grid.prod() * block.prod()), -1, np.int32)
    launch("order", grid, block, out)
    return out.tolist()


def exchange() -> np.ndarray:
    values, out = np.arange(64, dtype=np.float32), np.full(64, np.nan, np.float32)
    launch("exchange", values, out)
    return out


def test_every_thread_of_every_block_runs_once() -> None:
    with settings():
        assert order(triple(3, 2, 2), triple(4, 3, 2)) == list(range(12 * 24))
        assert counters()["blocks"] == 12
        assert counters()["launches"] == 1


def test_the_seed_is_the_schedule() -> None:
    def seen(seed: int) -> list[int]:
        with settings(seed=seed):
            return order(triple(4), triple(32))

    ascending = seen(0)
    assert seen(1) == ascending[::-1]
    assert seen(2) == seen(2)
    assert len({tuple(seen(seed)) for seed in range(2, 8)}) == 6
    assert sorted(seen(2)) == ascending


def test_threads_without_barriers_share_fibers() -> None:
    with settings():
        order(triple(8), triple(256))
        assert counters()["switches"] == 16  # to the block's only fiber and back


@pytest.mark.parametrize("seed", range(6))
def test_barriers_let_threads_exchange_values(seed: int) -> None:
    with settings(seed=seed):
        out = exchange()
    sums = np.repeat([sum(range(32, 64)), sum(range(32))], 32)
    assert np.array_equal(out, sums)


def test_global_traffic_is_counted() -> None:
    data, out, total = np.ones((64, 4), np.float32), np.empty((64, 4), np.float32), np.zeros(1, np.float32)
    with settings():
        launch("traffic", data, out, total, 64)
        assert counters()["global_read_bytes"] == 64 * (16 + 4)
        assert counters()["global_write_bytes"] == 64 * 16
        library().freezekit_emulator_reset_counters()
        assert set(counters().values()) == {0}
    assert np.array_equal(data, out)
    assert total[0] == 64


def test_an_unknown_counter_or_mode_is_no_silent_default() -> None:
    assert library().freezekit_emulator_counter(b"no such counter") == 2**64 - 1
    assert not library().freezekit_emulator_set_cp_async(b"sooner")


def test_shared_memory_begins_as_nan() -> None:
    out = np.zeros(2, np.float32)
    launch("poison", out)
    assert np.isnan(out).all()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_the_launch_and_nothing_else(name: str) -> None:
    for _ in range(3):
        with pytest.raises(RuntimeError, match=FAULTS[name]):
            launch("fault", list(FAULTS).index(name), np.zeros(64, np.uint8))
    assert "thread" in last_error()
    assert "of 32,1,1" in last_error()
    test_barriers_let_threads_exchange_values(0)


@pytest.mark.parametrize(
    ("grid", "block", "why"),
    [
        (triple(0), triple(32), "a dimension is zero"),
        (triple(1), triple(32, 0), "a dimension is zero"),
        (triple(1), triple(1025), "the block is too large"),
        (triple(1), triple(32, 32, 2), "the block is too large"),
        (triple(1), triple(1, 1, 65), "the block is too large"),
        (triple(1, 65536), triple(1), "the grid is too large"),
    ],
)
def test_a_launch_that_a_gpu_would_refuse_is_refused(grid: np.ndarray, block: np.ndarray, why: str) -> None:
    with pytest.raises(RuntimeError, match=why):
        launch("order", grid, block, np.zeros(1, np.int32))


def test_a_block_has_227_kib_of_dynamic_shared_memory() -> None:
    out = np.zeros(2, np.float32)
    launch("dynamic_shared", ctypes.c_size_t(227 * 1024), out)
    with pytest.raises(RuntimeError, match="more dynamic shared memory"):
        launch("dynamic_shared", ctypes.c_size_t(227 * 1024 + 1), out)


def test_launches_from_several_threads_take_turns() -> None:
    expected = exchange()
    wrong: list[np.ndarray] = []

    def work() -> None:
        for _ in range(50):
            out = exchange()
            if not np.array_equal(out, expected):
                wrong.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
