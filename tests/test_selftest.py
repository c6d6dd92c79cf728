"""The self-test passes here, and fails where a kernel is wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import freezekit as fk
from bench.environment import measure_peaks
from bench.settings import Settings
from freezekit import _C, functional, selftest, tuning
from freezekit._tf32 import allows_tf32
from freezekit._tf32 import tf32 as with_tf32

ROOT = Path(__file__).resolve().parents[1]


def test_every_kernel_passes_on_this_machine() -> None:
    run = subprocess.run([sys.executable, "-m", "freezekit.selftest"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout
    kernels = [f"{family}_{op}" for family in ("direct", "implicit_gemm") for op in ("fprop", "dgrad", "wgrad")]
    kernels += [f"depthwise_{op}_{kind}" for op in ("fprop", "dgrad", "wgrad") for kind in ("tiled", "generic")]
    kernels += ["activation_relu", "activation_hardtanh", "activation_leaky_relu", "gate_select", "gate_scale"]
    kernels += ["max_pool, max_pool_scatter", "frozen_conv2d"]
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
    monkeypatch.setattr(selftest, "PROBLEMS", selftest.PROBLEMS[:1])
    monkeypatch.setattr(selftest, "layers_for", lambda backend: [])
    assert selftest.main(["--backend", "aten"]) == 4  # one a dtype
    printed = capsys.readouterr().out
    assert printed.count("FAIL") == 4
    assert "15 passed, 4 failed" in printed


@pytest.mark.parametrize("name", selftest.LAYERS)
def test_a_layer_is_torch_s_value_for_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, state = torch.device("cpu"), torch.get_rng_state()
    for backend in ("aten", "emulated"):
        rows = list(selftest.selftest(backend, device, (), 0, [name]))
        assert [(row.operator, row.passed) for row in rows] == [(name, True)] * len(selftest.DTYPES)
    assert torch.equal(torch.get_rng_state(), state)
    own, stock = selftest.LAYERS[name]

    def wrong(x: Tensor) -> Tensor:
        """In the gradient of one element alone."""
        y = own(x)
        share = torch.zeros_like(y)
        share[0, 0, 0, 0] = 0.5
        return y + share * (x - x.detach())[0, 0, 0, 0]

    monkeypatch.setitem(selftest.LAYERS, name, (wrong, stock))
    assert not any(row.passed for row in selftest.selftest("aten", device, (), 0, [name]))


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
    assert selftest._hopper_in_a_child("native", time.monotonic() + 2) == (3 if body == "exit 3" else 1)
    assert said in capsys.readouterr().out


KEPT = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second operator of the first problem makes an error that the device gives to all later calls."""
    down: list[bool] = []

    def broken(*_, **__):
        down.append(True)
        raise RuntimeError(KEPT)

    monkeypatch.setattr(selftest, "PROBLEMS", selftest.PROBLEMS[:1])
    monkeypatch.setattr(selftest, "layers_for", lambda backend: [])
    monkeypatch.setattr(functional, "conv2d_dgrad", broken)
    monkeypatch.setattr(selftest, "_lost", lambda device: KEPT if down else "")


@pytest.mark.usefixtures("lost")
def test_after_an_error_that_the_device_keeps_another_process_runs_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child, told = tmp_path / "python", tmp_path / "told"
    child.write_text(f'#!/bin/sh\necho "$@" > {told}\nexit 2\n')
    child.chmod(0o755)
    monkeypatch.setattr(selftest.sys, "executable", str(child))
    assert selftest.main(["--backend", "aten"]) == 1 + 2
    *arguments, until = told.read_text().split()
    assert " ".join(arguments) == "-m freezekit.selftest --backend aten --skip 2 --processes 3 --until"
    assert float(until) < time.monotonic() + selftest.SECONDS
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("pass") for line in lines) == 1
    assert sum(KEPT in line and "FAIL" in line for line in lines) == 1
    assert any("17 rows are left to another" in line for line in lines)


@pytest.mark.usefixtures("lost")
def test_what_no_process_is_left_for_is_not_run_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--backend", "aten", "--processes", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(f"not run: {KEPT}") for line in lines) == 17
    assert "1 passed, 1 failed; kernels: 2" in lines


def test_the_rest_is_what_was_not_run() -> None:
    whole = list(selftest.selftest("aten", torch.device("cpu"), selftest.PROBLEMS[:1]))
    rest = list(selftest.selftest("aten", torch.device("cpu"), selftest.PROBLEMS[:1], skip=14))
    assert [(row.operator, row.dtype) for row in rest] == [(row.operator, row.dtype) for row in whole[14:]]
    assert len(rest) == 5


@pytest.mark.parametrize("failures", [0, 2])
def test_kernels_of_sm_90a_that_pass_in_a_child_become_a_choice(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "_hopper_in_a_child", lambda backend, until: failures)
    file = tmp_path / "choices.json"
    assert selftest.main(["--hopper", "--save-choices", str(file)]) == failures
    assert file.exists() == (failures == 0)
    if failures:
        return
    tuning.clear_choices()
    tuning.load_choices(file.read_text())
    assert [str(choice) for choice in tuning.choices()] == ["hopper self-test on cpu sm_80 of 4: passed"]
    tuning.clear_choices()


def test_choices_are_saved_of_hopper_alone() -> None:
    with pytest.raises(SystemExit):
        selftest.main(["--save-choices", "choices.json"])


def test_a_file_that_cannot_be_made_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "_hopper_in_a_child", lambda backend, until: 0)
    with pytest.raises(SystemExit):
        selftest.main(["--hopper", "--save-choices", str(tmp_path / "no" / "choices.json")])
    assert "no file can be made at" in capsys.readouterr().err


def newer_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cudnn.allow_tf32` raises, as where convolutions and recurrent layers are set to different precisions."""

    def mixed(*_: object) -> bool:
        raise RuntimeError("the current flag(s) indicate that cuDNN conv and cuDNN RNN have different TF32 flags")

    monkeypatch.setattr(type(torch.backends.cudnn), "allow_tf32", property(mixed))


def test_a_setting_that_raises_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    newer_precision(monkeypatch)
    with pytest.raises(RuntimeError, match="different TF32 flags"):
        print(torch.backends.cudnn.allow_tf32)
    assert all(row.passed for row in selftest.selftest("aten", torch.device("cpu"), selftest.PROBLEMS[:1]))
    before = torch.backends.cudnn.conv.fp32_precision
    for allowed in (True, False):
        with with_tf32(allowed):
            assert allows_tf32() is allowed
    assert torch.backends.cudnn.conv.fp32_precision == before
    net = fk.convert(torch.nn.Conv2d(3, 4, 3))
    assert next(iter(fk.explain(net, torch.randn(1, 3, 6, 6)))).kernel == "aten"
    assert Settings(torch.device("cuda"), torch.float32).tf32 is False
    assert measure_peaks(torch.device("cpu"), torch.float32).tflops > 0


@pytest.mark.parametrize("is_wrong", [False, True])
def test_where_time_ends_before_the_rows_do_nothing_has_passed(
    is_wrong: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a busy machine: an end from outside would look like a failure, and Hopper's rows would never be run."""
    child: list[float] = []

    def slow(*_: object) -> Iterator[selftest.Verdict]:
        yield selftest.Verdict("conv2d", "p", "float32", "k", 2.0 if is_wrong else 0.5, 0.0)
        for _ in range(600):
            time.sleep(0.1)
            yield selftest.Verdict("conv2d", "p", "float32", "k", 0.5, 0.0)

    monkeypatch.setattr(selftest, "_is_hopper", lambda device: True)
    monkeypatch.setattr(selftest, "_hopper_in_a_child", lambda backend, until: child.append(until) or 0)
    monkeypatch.setattr(_C, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(selftest, "selftest", slow)
    start = time.monotonic()
    assert selftest.main(["--backend", "native", "--until", str(start + 3)]) == (
        1 if is_wrong else selftest.NOT_ALL_RUN
    )
    assert time.monotonic() < start + 2.9, "a third of the time is Hopper's"
    assert child == [start + 3]
    assert capsys.readouterr().out.splitlines()[-1] == "not run: no time was left for the rows behind"


def test_hopper_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """In a process with a limit, as always: who asks for them alone waits no longer for one that hangs."""
    assert selftest.main(["--hopper", "--until", str(time.monotonic())]) == 1
    assert "the kernels of sm_90a were not run: no time was left" in capfd.readouterr().out
    assert selftest.main(["--hopper"]) == 0
    rows = [line for line in capfd.readouterr().out.splitlines() if line.endswith("pass")]
    assert len(rows) == len(selftest.HOPPER_PROBLEMS) * 8
    assert all(" hopper_" in row for row in rows)
    with pytest.raises(SystemExit):
        selftest.main(["--backend", "aten", "--hopper"])


@pytest.mark.parametrize("more", [[], ["--hopper"]])
@pytest.mark.parametrize(("has_kernels", "said"), [(True, "sees no CUDA device here"), (False, "has no CUDA kernels")])
def test_a_backend_that_is_not_there_is_told_in_a_line(
    has_kernels: bool, said: str, more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_C, "has_cuda_kernels", lambda: has_kernels)
    with pytest.raises(SystemExit) as ended:
        selftest.main(["--backend", "native", *more])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "argument --backend: 'native' needs freezekit's CUDA kernels and a GPU: " in error
    assert said in error
