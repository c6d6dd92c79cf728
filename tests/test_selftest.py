"""The self-test passes here, and fails where a kernel is wrong."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from freezekit import _C, functional, selftest

ROOT = Path(__file__).resolve().parents[1]


def test_every_kernel_passes_on_this_machine() -> None:
    run = subprocess.run([sys.executable, "-m", "freezekit.selftest"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout
    kernels = [f"{family}_{op}" for family in ("direct", "implicit_gemm") for op in ("fprop", "dgrad", "wgrad")]
    kernels += [f"depthwise_{op}_{kind}" for op in ("fprop", "dgrad", "wgrad") for kind in ("tiled", "generic")]
    for word in ("native" if torch.cuda.is_available() else "emulated", "error / bound", "ms", "bias_grad", *kernels):
        assert word in run.stdout, word
    assert "0 failed" in run.stdout


def test_every_family_meets_every_dtype_that_it_takes() -> None:
    """By the kernels that ran, in each dtype: what select() gives for the self-test's problems."""
    target = {"sm": 80, "sm_count": 4}
    met: dict[tuple[str, str], set[str]] = {}
    for problem in selftest.PROBLEMS:
        settings = [(value, value) for value in (problem.stride, problem.padding, problem.dilation)]
        for dtype, tf32 in [
            ("float32", False),
            ("float32", True),
            *((d, False) for d in ("float64", "float16", "bfloat16")),
        ]:
            for operator in selftest.PRODUCTS:
                sizes = problem.input_size, problem.weight_size
                chosen = _C.select(operator, dtype, *sizes, *settings, problem.groups, allow_tf32=tf32, **target)
                met.setdefault((chosen["family"], operator), set()).add("tf32" if tf32 else dtype)
    exact = {"float32", "float64", "float16", "bfloat16"}
    for operator in selftest.PRODUCTS:
        assert met["direct", operator] >= exact
        assert met["depthwise", operator] >= exact
        assert met["implicit_gemm", operator] == {"float16", "bfloat16", "tf32"}


def test_help_says_what_it_does() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "freezekit.selftest", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0
    for word in ("float64", "--backend", "number of failures"):
        assert word in " ".join(run.stdout.split())


def test_a_wrong_kernel_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_exit_code_counts_the_failures_of_a_planted_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = functional.conv2d_bias_grad
    monkeypatch.setattr(functional, "conv2d_bias_grad", lambda dy, **settings: right(dy, **settings) + 1)
    monkeypatch.setattr(selftest, "selftest", functools.partial(selftest.selftest, problems=selftest.PROBLEMS[:1]))
    assert selftest.main(["--backend", "aten"]) == 4  # one a dtype
    printed = capsys.readouterr().out
    assert printed.count("FAIL") == 4
    assert "15 passed, 4 failed" in printed


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
    bad = selftest.Verdict("conv2d", "p", "float32", "k", 2.0, 0.0)
    monkeypatch.setattr(selftest, "selftest", lambda *_: iter([bad] * 200))
    assert selftest.main(["--backend", "aten"]) == 125
    monkeypatch.setattr(selftest, "selftest", lambda *_: iter([bad, bad]))
    assert selftest.main(["--backend", "aten"]) == 2


@pytest.mark.parametrize(("body", "said"), [("sleep 60", "ended after"), ("kill -9 $$", "by signal 9"), ("exit 3", "")])
def test_what_the_kernels_of_sm_90a_do_to_their_process_is_a_result(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They run in a child: it may hang, die or count failures."""
    child = tmp_path / "python"
    child.write_text(f"#!/bin/sh\n{body}\n")
    child.chmod(0o755)
    monkeypatch.setattr(selftest.sys, "executable", str(child))
    monkeypatch.setattr(selftest, "HOPPER_SECONDS", 2)
    assert selftest._hopper_in_a_child() == (3 if body == "exit 3" else 1)
    assert said in capsys.readouterr().out


def test_hopper_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--hopper"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("pass")]
    assert len(rows) == len(selftest.HOPPER_PROBLEMS) * 8
    assert all(" hopper_" in row for row in rows)
    with pytest.raises(SystemExit):
        selftest.main(["--backend", "aten", "--hopper"])
