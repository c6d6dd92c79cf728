"""The emulator's __half and __nv_bfloat16 against numpy and torch: every value, every rounding boundary."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from .probe import library, pointer

TORCH = {"half": torch.float16, "bfloat16": torch.bfloat16}
ALL_BITS = np.arange(65536, dtype=np.uint16)


def widen(name: str, bits: np.ndarray) -> np.ndarray:
    out = np.empty(len(bits), dtype=np.float32)
    getattr(library(), f"probe_{name}_to_float")(pointer(bits), pointer(out), ctypes.c_int64(len(bits)))
    return out


def narrow(name: str, values: np.ndarray) -> np.ndarray:
    out = np.empty(len(values), dtype=np.uint16)
    getattr(library(), f"probe_float_to_{name}")(pointer(values), pointer(out), ctypes.c_int64(len(values)))
    return out


def assert_rounds_as_torch(name: str, values: np.ndarray) -> None:
    bits = narrow(name, values)
    expected = torch.from_numpy(values).to(TORCH[name]).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    assert np.array_equal(bits[~nan], expected[~nan])
    assert (bits[nan] == 0x7FFF).all()


@pytest.mark.parametrize("name", TORCH)
def test_every_value_widens_as_in_torch(name: str) -> None:
    expected = torch.from_numpy(ALL_BITS.view(np.int16).copy()).view(TORCH[name]).float().numpy()
    assert np.array_equal(widen(name, ALL_BITS).view(np.uint32) & 0xFF800000, expected.view(np.uint32) & 0xFF800000)
    assert np.array_equal(widen(name, ALL_BITS), expected, equal_nan=True)


@pytest.mark.parametrize("name", TORCH)
def test_every_value_comes_back(name: str) -> None:
    values = widen(name, ALL_BITS)
    number = ~np.isnan(values)
    assert np.array_equal(narrow(name, values)[number], ALL_BITS[number])


@pytest.mark.parametrize("name", TORCH)
def test_ties_and_their_neighbours_round_as_in_torch(name: str) -> None:
    values = widen(name, ALL_BITS)
    values = np.sort(values[np.isfinite(values)]).astype(np.float64)
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    above, below = (np.nextafter(middles, np.float32(limit), dtype=np.float32) for limit in (np.inf, -np.inf))
    assert_rounds_as_torch(name, np.concatenate([middles, above, below]))


@pytest.mark.parametrize("name", TORCH)
def test_random_floats_round_as_in_torch(name: str) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint64).astype(np.uint32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, 3.4e38, 1e-45, -1e-45], np.float32)
    assert_rounds_as_torch(name, np.concatenate([bits.view(np.float32), special, -special]))
