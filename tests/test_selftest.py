"""The self-test passes here, and fails where a kernel is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from freezekit import functional, selftest

ROOT = Path(__file__).resolve().parents[1]


def test_every_kernel_passes_on_this_machine() -> None:
    run = subprocess.run([sys.executable, "-m", "freezekit.selftest"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout
    families = ("native" if torch.cuda.is_available() else "emulated", "direct_fprop", "implicit_gemm_dgrad")
    for word in families:
        assert word in run.stdout
    assert "0 failed" in run.stdout


def test_a_wrong_kernel_is_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = functional.conv2d_dgrad

    def wrong(*args, **kwargs):
        dx = right(*args, **kwargs)
        dx.view(-1)[-1] += 1e-2 if dx.dtype != torch.float64 else 1e-9
        return dx

    monkeypatch.setattr(functional, "conv2d_dgrad", wrong)
    problem = selftest.Problem("ragged", (1, 3, 5, 5), (4, 3, 3, 3))
    rows = list(selftest.selftest("aten", torch.device("cpu"), [problem]))
    failed = {(row.operator, row.dtype) for row in rows if not row.passed}
    assert {("conv2d_dgrad", "float32"), ("conv2d_dgrad", "float64")} <= failed
    assert {operator for operator, _ in failed} == {"conv2d_dgrad"}


def test_nan_and_errors_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = selftest.Problem("1x1", (1, 2, 3, 3), (2, 2, 1, 1))
    monkeypatch.setattr(functional, "conv2d", lambda x, w, **_: torch.full((1, 2, 3, 3), float("nan"), dtype=x.dtype))
    rows = list(selftest.selftest("aten", torch.device("cpu"), [problem]))
    assert not any(row.passed for row in rows if row.operator == "conv2d")

    def broken(*_, **__):
        raise RuntimeError("out of order\nsecond line")

    monkeypatch.setattr(functional, "conv2d", broken)
    row = next(iter(selftest.selftest("aten", torch.device("cpu"), [problem])))
    assert (row.passed, row.failure) == (False, "out of order")


def test_the_exit_code_counts_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = selftest.Row("conv2d", "p", "float32", "k", 2.0, 0.0)
    monkeypatch.setattr(selftest, "selftest", lambda *_: iter([bad] * 200))
    assert selftest.main(["--backend", "aten"]) == 125
    monkeypatch.setattr(selftest, "selftest", lambda *_: iter([bad, bad]))
    assert selftest.main(["--backend", "aten"]) == 2
