"""The kernels of sm_90a from Python: on request alone, by the context that asks, never by `auto`."""

from __future__ import annotations

import json

import pytest
import torch

import freezekit as fk
from freezekit import _C, selftest
from freezekit.backends import switched
from freezekit.functional import conv2d, conv2d_dgrad, conv2d_wgrad
from tests.proof.stand_in import stand_in


def kernels_of_a_step() -> list[str]:
    """What forward and both gradients of one convolution launched."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-2, 3, size, generator=generator).bfloat16() for size in ((1, 64, 6, 6), (64, 64, 3, 3)))
    _C.set_launch_log(True)
    try:
        conv2d(x, w, padding=1)
        conv2d_dgrad(x, w, x.shape, padding=1)
        conv2d_wgrad(x, x, w.shape, padding=1)
        return [row["kernel"] for row in _C.take_launch_log()]
    finally:
        _C.set_launch_log(False)


def test_a_context_asks_for_them() -> None:
    with fk.testing.emulated(hopper=True):
        assert all(kernel.startswith("hopper_") for kernel in kernels_of_a_step())
        with fk.testing.emulated():
            assert all(kernel.startswith("implicit_gemm_") for kernel in kernels_of_a_step())
        assert all(kernel.startswith("hopper_") for kernel in kernels_of_a_step())
    with fk.testing.emulated():
        assert all(kernel.startswith("implicit_gemm_") for kernel in kernels_of_a_step())


def test_they_give_what_the_others_give() -> None:
    x, w = torch.randn(1, 64, 7, 6).half(), torch.randn(40, 64, 3, 3).half()
    with fk.testing.emulated():
        expected = conv2d(x, w, stride=2)
    with fk.testing.emulated(hopper=True):
        torch.testing.assert_close(conv2d(x, w, stride=2), expected)


def test_auto_runs_none_that_no_self_test_has_passed() -> None:
    """Not even where it has found the kernels of sm_80 to be the fastest, within the context of another call."""
    with stand_in(), switched("auto", hopper=True):
        assert not any("hopper" in kernel for kernel in kernels_of_a_step())
        assert not any("hopper" in choice.problem for choice in fk.tuning.choices())


@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.parametrize(("seconds", "winner"), [(1e-7, "hopper_"), (1e-5, "implicit_gemm_"), (1e-2, "")])
def test_once_their_self_test_has_passed_they_are_a_third_candidate(
    monkeypatch: pytest.MonkeyPatch, benchmark: bool, seconds: float, winner: str
) -> None:
    """Held against torch's operator like the others; taken where they are the fastest of three."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    with stand_in():
        _C.choices.admit_hopper(True)
        met = kernels_of_a_step()
        assert {kernel.split("_")[0] for kernel in met} == {"hopper", "implicit"}
        document = json.loads(fk.tuning.dump_choices())
        assert sum("by hopper_" in row["problem"] for row in document["choices"]) == 3
        assert len(document["choices"]) == 1 + 2 * 3
        for row in document["choices"]:
            if not row["problem"].startswith("hopper"):
                others = 1e-6 if seconds < 1e-3 else seconds
                row.update(aten_seconds=1e-3, native_seconds=seconds if "by hopper_" in row["problem"] else others)
        fk.tuning.clear_choices()
        fk.tuning.load_choices(json.dumps(document))
        taken = kernels_of_a_step()
        assert len(taken) == (3 if winner else 0)
        assert all(kernel.startswith(winner) for kernel in taken)
        select = _C.select(
            "conv2d", "bfloat16", (1, 64, 6, 6), (64, 64, 3, 3), padding=(1, 1), device="cpu", sm_count=4
        )
        assert select["auto_kernel"].startswith(winner)
        assert select["auto"] == ("emulated" if winner else "aten")


@pytest.mark.parametrize("name", ["auto", "aten"])
def test_other_backends_have_none(name: fk.backends.Backend) -> None:
    with pytest.raises(ValueError, match=f"hopper=True needs backend 'native', got '{name}'"):
        fk.backend(name, hopper=True)


def test_select_says_why() -> None:
    sizes = ((8, 64, 56, 56), (64, 64, 3, 3))
    asked = _C.select("conv2d", "bfloat16", *sizes, padding=(1, 1), sm=90, hopper=True)
    assert (asked["family"], asked["auto"]) == ("hopper", "aten")
    assert "asked for" in asked["reason"]
    assert _C.select("conv2d", "bfloat16", *sizes, padding=(1, 1), sm=90)["family"] == "implicit_gemm"


def test_the_selftest_runs_them() -> None:
    rows = list(selftest.selftest_hopper("emulated", torch.device("cpu")))
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
    assert {row.kernel.split("_")[1] for row in rows} >= {"fprop", "dgrad", "wgrad"}
