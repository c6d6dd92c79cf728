"""`python -m freezekit.selftest`: every kernel on the device that is here, against float64; layers against torch's own.

What a person with a new GPU runs first. On a CPU it is ATen's code that runs or, in a source folder, the source of the
kernels, emulated: not the same hardware. Rows are printed as they are made. On a GPU of sm_90 its own kernels come
last; they run in a process with a time limit, always. After an error that the device keeps, the rest runs in a new
process. The exit code is the number of failures, at most 125; it is 77 where there is none and time ended before the
rows did.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freezekit import _C, _extension, _layer_checks, functional
from freezekit._layer_checks import LAYERS, layers_for
from freezekit._tf32 import tf32 as with_tf32
from freezekit.backends import switched
from freezekit.tuning import dump_choices

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Bits of the significand that a product's factors keep: what bounds the error of one term.
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TF32_ROUNDOFF = 2.0**-11
PRODUCTS = ("conv2d", "conv2d_dgrad", "conv2d_wgrad")


@dataclass(frozen=True)
class Problem:
    """One convolution, named by what it exercises."""

    name: str
    input_size: tuple[int, int, int, int]
    weight_size: tuple[int, int, int, int]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}


PROBLEMS = (
    Problem("1x1", (2, 64, 9, 9), (72, 64, 1, 1)),
    Problem("3x3", (2, 40, 8, 8), (64, 40, 3, 3), padding=1),
    Problem("3x3 stride 2", (1, 32, 9, 9), (48, 32, 3, 3), stride=2, padding=1),
    Problem("3x3 dilation 2", (1, 32, 9, 9), (32, 32, 3, 3), dilation=2, padding=2),
    Problem("7x7 stem", (1, 3, 17, 17), (16, 3, 7, 7), stride=2, padding=3),
    Problem("ragged channels", (1, 13, 7, 6), (21, 13, 3, 3), padding=1),
    Problem("grouped", (1, 64, 6, 6), (64, 16, 3, 3), padding=1, groups=4),
    Problem("few channels per group", (1, 32, 6, 6), (64, 4, 3, 3), padding=1, groups=8),
    Problem("depthwise 3x3", (1, 24, 9, 9), (24, 1, 3, 3), padding=1, groups=24),
    Problem("depthwise 5x5 stride 2", (1, 16, 11, 11), (16, 1, 5, 5), stride=2, padding=2, groups=16),
    Problem("depthwise 7x7", (1, 16, 9, 9), (16, 1, 7, 7), padding=3, groups=16),
    Problem("depthwise, multiplier 2", (1, 16, 11, 11), (32, 1, 5, 5), stride=2, padding=2, groups=16),
)

# Of layers: their sizes are _layer_checks'.
LAYER = Problem("layer", _layer_checks.SIZE, (0, 0, 0, 0))

# What the kernels of sm_90a take: whole 16-byte chunks of channels, at least half of 128 bytes of them.
HOPPER_PROBLEMS = PROBLEMS[:4]
SECONDS = 180.0  # until processes that were started must have ended, by default
MOST_PROCESSES = 4  # beside the first, for the rows after errors that a device keeps
NOT_ALL_RUN = 77  # exits so where nothing failed, and time ended before the rows did


@dataclass(frozen=True)
class Verdict:
    """One kernel on one problem.

    Attributes:
        error: largest error over the bound that rounding allows; at most 1 passes. NaN where the run failed. ATen makes
            no promise of its own: in half precision some of its CPU code rounds every partial sum. There the bound is
            the error of torch's own operator, on the same tensors, where that is larger.
        milliseconds: of one call; on a GPU the second one, with synchronisation.
    """

    operator: str
    problem: str
    dtype: str
    kernel: str
    error: float
    milliseconds: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.error <= 1


Case = tuple[str, Problem, torch.dtype, bool]  # operator, problem, dtype, whether in tf32


def _cases(problems: Iterable[Problem]) -> Iterator[Case]:
    for problem in problems:
        for dtype, tf32 in [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]:
            for operator in PRODUCTS if tf32 else (*PRODUCTS, "conv2d_bias_grad"):
                yield operator, problem, dtype, tf32


def _layer_cases(layers: Iterable[str]) -> Iterator[Case]:
    for name in layers:
        for dtype in DTYPES:
            yield name, LAYER, dtype, False


def selftest(
    backend: str,
    device: torch.device,
    problems: Iterable[Problem] = PROBLEMS,
    skip: int = 0,
    layers: Iterable[str] = (),
) -> Iterator[Verdict]:
    """Runs each operator of each problem in each dtype on `backend`, and float32 in tf32 too, all but the first `skip`.

    Then the layers of these names, value and gradient.

    >>> rows = list(selftest("aten", torch.device("cpu"), PROBLEMS[:1]))
    >>> all(row.passed for row in rows), len(rows)
    (True, 19)
    """
    cases = itertools.chain(_cases(problems), _layer_cases(layers))
    for operator, problem, dtype, tf32 in itertools.islice(cases, skip, None):
        with with_tf32(tf32), switched(backend):
            yield _run(operator, problem, dtype, tf32, backend, device)


def selftest_hopper(backend: str, device: torch.device) -> Iterator[Verdict]:
    """The kernels of sm_90a, which no other row runs: they are asked for, see `freezekit.backend`."""
    for problem in HOPPER_PROBLEMS:
        for dtype, tf32 in [(torch.float16, False), (torch.bfloat16, False), (torch.float32, True)]:
            for operator in ("conv2d", "conv2d_dgrad", *([] if tf32 else ["conv2d_wgrad"])):
                with with_tf32(tf32), switched(backend, hopper=True):
                    row = _run(operator, problem, dtype, tf32, backend, device)
                if not row.failure and not row.kernel.startswith("hopper"):
                    row = replace(row, failure=f"{row.kernel} ran instead")
                yield row


def _run(
    operator: str, problem: Problem, dtype: torch.dtype, tf32: bool, backend: str, device: torch.device
) -> Verdict:
    name = _name_of(dtype, tf32)
    try:
        if problem is LAYER:
            kernel, error, seconds = _layer(operator, dtype, backend, device)
        else:
            kernel, error, seconds = _product(operator, problem, dtype, tf32, backend, device)
    except RuntimeError as failure:
        return Verdict(operator, problem.name, name, "", float("nan"), 0.0, str(failure).splitlines()[0])
    return Verdict(operator, problem.name, name, kernel, error, seconds * 1e3)


def _product(
    operator: str, problem: Problem, dtype: torch.dtype, tf32: bool, backend: str, device: torch.device
) -> tuple[str, float, float]:
    """The kernel that ran, its error over the bound, and seconds."""
    x, w, dy = _tensors(problem, dtype, device)
    call = {
        "conv2d": lambda: functional.conv2d(x, w, **problem.settings),
        "conv2d_dgrad": lambda: functional.conv2d_dgrad(dy, w, problem.input_size, **problem.settings),
        "conv2d_wgrad": lambda: functional.conv2d_wgrad(dy, x, problem.weight_size, **problem.settings),
        "conv2d_bias_grad": lambda: functional.conv2d_bias_grad(dy),
    }[operator]
    kernel, result, seconds = _timed(call, backend, device)
    unit = TF32_ROUNDOFF if tf32 else UNIT_ROUNDOFF[dtype]
    error = _error(operator, problem, x, w, dy, result, unit, UNIT_ROUNDOFF[dtype])
    if backend == "aten":
        stock = _by_torch(operator, problem, x, w, dy)
        error /= max(1.0, _error(operator, problem, x, w, dy, stock, unit, UNIT_ROUNDOFF[dtype]))
    return kernel, error, seconds


def _layer(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> tuple[str, float, float]:
    own, stock = LAYERS[name]
    kernel, result, seconds = _timed(lambda: _layer_checks.step(own, name, dtype, device), backend, device)
    return kernel, _layer_checks.error(result, _layer_checks.step(stock, name, dtype, device)), seconds


def _name_of(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


def _tensors(problem: Problem, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).contiguous(memory_format=torch.channels_last)

    x, w = random(*problem.input_size), random(*problem.weight_size)
    y_size = F.conv2d(x.to("meta"), w.to("meta"), **problem.settings).shape
    return x, w, random(*y_size)


def _timed(call: Any, backend: str, device: torch.device) -> tuple[str, Any, float]:
    """The kernel that ran, its result, and seconds of a call; a GPU's first call also loads its code."""
    seconds = 0.0
    for _ in range(2 if device.type == "cuda" else 1):
        _C.set_launch_log(True)
        try:
            start = time.perf_counter()
            result = call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
            log = _C.take_launch_log()
        finally:
            _C.set_launch_log(False)
    kernels = [row["kernel"] for row in log if row["kernel"] not in ("filter_transform", "norm_affine")]
    return ", ".join(kernels) or backend, result, seconds


def _error(
    operator: str, problem: Problem, x: Tensor, w: Tensor, dy: Tensor, result: Tensor, unit: float, store: float
) -> float:
    """Largest error over its bound: rounding of each term, and of the sum, scaled by the sum of absolute values.

    The bound on a sum of n products is n units of the accumulator's roundoff times sum |a b| (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1); inputs in tf32 add two units each, storing the result one.
    """
    doubles = [t.double().cpu() for t in (x, w, dy)]
    exact, size = _by_torch(operator, problem, *doubles), _by_torch(operator, problem, *(t.abs() for t in doubles))
    terms = max(1, problem.weight_size[1] * problem.weight_size[2] * problem.weight_size[3], dy[:, 0].numel())
    accumulate = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    inputs = 2 * unit if unit > store else 0.0
    bound = size * (terms * accumulate + inputs) + exact.abs() * store + 1e-30
    error = (result.double().cpu() - exact).abs() / bound
    return float("inf") if error.isnan().any() else float(error.max())


def _by_torch(operator: str, problem: Problem, x: Tensor, w: Tensor, dy: Tensor) -> Tensor:
    if operator == "conv2d_bias_grad":
        return dy.sum((0, 2, 3))
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = F.conv2d(x, w, **problem.settings)
    if operator == "conv2d":
        return y.detach()
    return torch.autograd.grad(y, x if operator == "conv2d_dgrad" else w, dy)[0]


def _print(row: Verdict) -> None:
    mark = "pass" if row.passed else f"FAIL {row.failure}"
    kernel = row.kernel or "-"
    figures = f"{row.error:13.2g} {row.milliseconds:9.2f}"
    print(f"{row.problem:24} {row.operator:17} {row.dtype:9} {kernel:36} {figures}  {mark}", flush=True)


def _lost(device: torch.device) -> str:
    """What the device says if nothing runs on it any more in this process: some errors of CUDA stay."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return ""


def _in_a_child(what: str, until: float, *arguments: str) -> int:
    """The failures of a self-test in a process of its own, where a hang or an error that stays spoils no other row."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        print(f"FAIL: {what} were not run: no time was left")
        return 1
    # A second earlier for what it may start itself: the process that started it reports it.
    command = [sys.executable, "-m", "freezekit.selftest", *arguments, "--until", str(until - 1)]
    try:
        code = subprocess.run(command, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"FAIL: {what} were ended after {seconds:.3g} s")
        return 1
    if code < 0:
        print(f"FAIL: {what} ended their process by signal {-code}")
    return 1 if code < 0 else code


def _named(backend: str) -> tuple[str, ...]:
    """The backend as an argument; nothing for the emulated one, which is the default where there is no GPU."""
    return () if backend == "emulated" else ("--backend", backend)


def _hopper_in_a_child(backend: str, until: float) -> int:
    return _in_a_child("the kernels of sm_90a", until, *_named(backend), "--hopper", "--processes", "0")


def _rest(backend: str, done: int, why: str, processes: int, until: float) -> int:
    """What is left after `done` rows, once the device answers `why` to everything. The failures."""
    cases = itertools.chain(_cases(PROBLEMS), _layer_cases(layers_for(backend)))
    left = list(itertools.islice(cases, done, None))
    if left and processes > 0:
        print(f"the device is lost to this process ({why}): {len(left)} rows are left to another", flush=True)
        again = (*_named(backend), "--skip", str(done), "--processes", str(processes - 1))
        return _in_a_child("the other rows", until, *again)
    for operator, problem, dtype, tf32 in left:
        print(f"{problem.name:24} {operator:17} {_name_of(dtype, tf32):9} not run: {why}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the number of failures, at most 125."""
    parser = argparse.ArgumentParser(prog="python -m freezekit.selftest", description=__doc__)
    default = "default: native where CUDA kernels and a GPU are there"
    parser.add_argument("--backend", choices=("native", "aten"), help=default)
    parser.add_argument("--hopper", action="store_true", help="the kernels for sm_90a alone")
    written = "with --hopper: if they pass, a file for freezekit.tuning.load_choices, for 'auto' to consider them"
    parser.add_argument("--save-choices", metavar="FILE", help=written)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=MOST_PROCESSES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=time.monotonic() + SECONDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available() and _C.has_cuda_kernels()
    if options.backend == "native" and not gpu:
        missing = "torch sees no CUDA device here" if _C.has_cuda_kernels() else "this build has no CUDA kernels"
        parser.error(f"argument --backend: 'native' needs freezekit's CUDA kernels and a GPU: {missing}")
    on_cpu = "emulated" if _extension.emulated_kernels().exists() else "aten"
    backend = options.backend or ("native" if gpu else on_cpu)
    device = torch.device("cuda" if backend == "native" or (backend == "aten" and gpu) else "cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    if options.hopper and backend == "aten":
        parser.error("--hopper needs freezekit's kernels, not ATen's")
    if options.save_choices and not options.hopper:
        parser.error("--save-choices needs --hopper")
    if options.save_choices and not os.access(Path(options.save_choices).resolve().parent, os.W_OK):
        parser.error(f"argument --save-choices: no file can be made at {options.save_choices}")
    if options.hopper and options.processes:
        failures = _hopper_in_a_child(backend, options.until)
        if options.save_choices and not failures:
            _save_choices(backend, Path(options.save_choices))
        return min(failures, 125)
    if not options.skip:
        print(f"freezekit selftest: {backend} on {where}")
        print(f"{'problem':24} {'operator':17} {'dtype':9} {'kernel':36} {'error / bound':>13} {'ms':>9}")
    parts = [] if options.hopper else [selftest(backend, device, PROBLEMS, options.skip, layers_for(backend))]
    if backend == "emulated" or options.hopper:
        parts.append(selftest_hopper(backend, device))
    hopper_follows = backend == "native" and not (options.hopper or options.skip) and _is_hopper(device)
    now = time.monotonic()
    end = options.until - (options.until - now) / 3 if hopper_follows else options.until
    rows, lost, stopped = [], "", False
    for row in itertools.chain(*parts):
        rows.append(row)
        _print(row)
        stopped = time.monotonic() >= end
        if stopped or (row.failure and (lost := _lost(device))):
            break
    failures = sum(not row.passed for row in rows)
    print(f"{len(rows) - failures} passed, {failures} failed; kernels: {len({row.kernel for row in rows})}", flush=True)
    codes = [failures]
    if lost and not options.hopper:
        codes.append(_rest(backend, options.skip + len(rows), lost, options.processes, options.until))
    if hopper_follows:
        codes.append(_hopper_in_a_child(backend, options.until))
    if stopped:
        print("not run: no time was left for the rows behind", flush=True)
        codes.append(NOT_ALL_RUN)
    return _code_of(codes)


def _code_of(codes: Sequence[int]) -> int:
    """Of parts that count their failures, or say that not all of them was run.

    >>> _code_of([0, 2, NOT_ALL_RUN]), _code_of([0, NOT_ALL_RUN]), _code_of([200]), _code_of([40, 37])
    (2, 77, 125, 78)
    """
    counted = [code for code in codes if code != NOT_ALL_RUN]
    failures = min(sum(counted), 125)
    if failures == NOT_ALL_RUN:
        return failures + 1
    return failures or (NOT_ALL_RUN if len(counted) < len(codes) else 0)


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _save_choices(backend: str, path: Path) -> None:
    _C.choices.admit_hopper(backend == "emulated")
    path.write_text(dump_choices())


if __name__ == "__main__":
    sys.exit(main())
