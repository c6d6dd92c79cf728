"""Measured choices: taken where faster, never where wrong, kept and carried as text."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

import freezekit as fk
import freezekit._C as _C


@pytest.fixture(autouse=True)
def no_choices() -> Iterator[None]:
    fk.clear_choices()
    yield
    fk.clear_choices()


def kernels(x: torch.Tensor, w: torch.Tensor) -> list[str]:
    """Operators that freezekit's kernels computed in one step."""
    _C.set_launch_log(True)
    try:
        fk.conv2d(x, w, padding=1).sum().backward()
        return [row["operator"] for row in _C.take_launch_log()]
    finally:
        _C.set_launch_log(False)


def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)


def test_auto_takes_aten_and_measures_nothing_unasked() -> None:
    assert kernels(*leaves()) == []
    with fk.autotune() as tuned:  # on a CPU there is no native kernel to measure
        kernels(*leaves())
    assert tuned.measurements == [] or torch.cuda.is_available()


def test_each_problem_is_measured_once() -> None:
    x, w = leaves()
    with fk.autotune(candidate="emulated") as tuned:
        first = kernels(x, w)
        again = kernels(x, w)
    assert len(first) > len(again)
    assert [m.problem.split()[0] for m in tuned.measurements] == ["conv2d", "conv2d_dgrad", "conv2d_wgrad"]
    assert all(m.agree and m.aten_seconds > 0 and m.native_seconds > 0 for m in tuned.measurements)
    expected = [m.problem.split()[0] for m in tuned.measurements if m.backend == "native"]
    assert sorted(again) == sorted(expected)


@pytest.mark.parametrize(("native", "agree", "taken"), [(1e-6, True, True), (1.0, True, False), (1e-6, False, False)])
def test_the_faster_right_one_is_taken(native: float, agree: bool, taken: bool) -> None:
    x, w = leaves()
    with fk.autotune(candidate="emulated") as tuned:
        kernels(x, w)
        rows = [{**vars(m), "native_seconds": native, "aten_seconds": 1e-3, "agree": agree} for m in tuned.measurements]
        fk.load_choices(json.dumps(rows))
        assert kernels(x, w) == (["conv2d", "conv2d_dgrad", "conv2d_wgrad"] if taken else [])
        assert {m.backend for m in tuned.measurements} == {"native" if taken else "aten"}
    assert kernels(x, w) == []  # outside the block the emulator is no candidate


def test_a_demanded_backend_is_not_tuned() -> None:
    with fk.autotune(candidate="emulated") as tuned, fk.backend("aten"):
        kernels(*leaves())
    assert tuned.measurements == []


def test_text_and_back() -> None:
    with fk.autotune(candidate="emulated") as tuned:
        kernels(*leaves())
    before, text = tuned.measurements, tuned.to_json()
    fk.clear_choices()
    assert tuned.measurements == []
    fk.load_choices(text)
    assert tuned.measurements == before


@pytest.mark.parametrize("text", ["", "[1]", '[{"problem": "x"}]', "{}x"])
def test_corrupt_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"what autotune\.to_json\(\) gave"):
        fk.load_choices(text)


def test_an_unknown_candidate_is_named() -> None:
    with pytest.raises(ValueError, match="candidate must be 'native' or 'emulated', got 'cudnn'"):
        fk.autotune(candidate="cudnn")
