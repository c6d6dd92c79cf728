"""Bit patterns: what counts as equal, and checksums that see every change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freezekit.freezing.bits import checksums, same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_each_single_bit_counts(dtype: torch.dtype) -> None:
    x = torch.zeros(5, dtype=dtype)
    one = checksums([x])[0]
    for byte in range(x.element_size()):
        y = x.clone()
        y.view(torch.uint8)[2 * x.element_size() + byte] ^= 1
        assert checksums([y])[0] != one
        assert not same_bits(x, y)
    assert same_bits(x, x.clone())


def test_signed_zero_and_nan() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert checksums([torch.tensor([0.0])]) != checksums([torch.tensor([-0.0])])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_changes_that_cancel_in_a_plain_sum(dtype: torch.dtype) -> None:
    x = torch.randn(64).to(dtype)
    one = checksums([x])
    for changed in (-x, x.flip(0), x.roll(1), torch.cat([x[32:], x[:32]]), x.abs(), x * 2):
        assert checksums([changed]) != one


def test_layout_and_views_do_not_matter() -> None:
    x = torch.randn(2, 3, 4, 4)
    same = [x.to(memory_format=torch.channels_last), x.transpose(1, 2).clone().transpose(1, 2), x[..., :4]]
    assert checksums([x, *same]) == checksums([x]) * 4
    z = torch.randn(3, dtype=torch.complex64)
    assert checksums([z.conj(), torch.imag(z.conj())]) == checksums([z.conj().resolve_conj(), -z.imag])
    one = z[:1].conj()
    assert same_bits(one.imag, -z[:1].imag), "a lazy negation is carried out"
    assert all(same_bits(x, y) for y in same)


def test_shape_and_dtype_are_part_of_equality() -> None:
    x = torch.zeros(4)
    assert not same_bits(x, x.view(2, 2))
    assert not same_bits(x, x.to(torch.int32))
    assert same_bits(torch.zeros(0), torch.zeros(0))
    assert checksums([]) == []


def test_chunks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1000)
    whole = checksums([x])
    monkeypatch.setattr("freezekit.freezing.bits._CHUNK", 7)
    assert checksums([x]) == whole


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_random_changes_are_seen(values: list[int], random: object) -> None:
    x = torch.tensor(values, dtype=torch.int32)
    shuffled = list(values)
    random.shuffle(shuffled)
    y = torch.tensor(shuffled, dtype=torch.int32)
    assert (checksums([x]) == checksums([y])) is (values == shuffled)
