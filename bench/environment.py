"""What a figure was measured on: device, versions, commit, date and the device's measured peaks."""

import datetime
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import freezekit
from bench.timing import clock_for
from freezekit._tf32 import allows_tf32

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Peaks:
    """The highest rates seen on this device: a square matrix product in the run's dtype, and a copy (read + write)."""

    tflops: float
    gbs: float

    def least_seconds(self, flops: float, traffic: float) -> float:
        """The roofline: no run is faster than its arithmetic or its traffic allows.

        >>> Peaks(tflops=1.0, gbs=100.0).least_seconds(flops=1e9, traffic=1e9)
        0.01
        """
        return max(flops / (self.tflops * 1e12), traffic / (self.gbs * 1e9))


@dataclass(frozen=True)
class Environment:
    """Printed at the start of every run and kept in its JSON."""

    device: str
    threads: int | None
    libraries: str
    torch: str
    freezekit: str
    python: str
    commit: str
    date: str
    peaks: Peaks

    def lines(self) -> list[str]:
        """For people."""
        threads = f", threads: {self.threads}" if self.threads else ""
        peaks = self.peaks
        return [
            f"device     {self.device}{threads}",
            f"peaks      {peaks.tflops:.3g} TFLOP/s (matrix product), {peaks.gbs:.3g} GB/s (copy), measured now",
            f"torch      {self.torch}, {self.libraries}, Python {self.python}",
            f"freezekit  {self.freezekit}, commit {self.commit}, {self.date}",
        ]


def describe(device: torch.device, dtype: torch.dtype) -> Environment:
    """Reads versions and measures peaks (a fraction of a second)."""
    cuda = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if cuda else _processor(),
        threads=None if cuda else torch.get_num_threads(),
        libraries=_libraries(cuda),
        torch=torch.__version__,
        freezekit=freezekit.__version__,
        python=platform.python_version(),
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        peaks=measure_peaks(device, dtype),
    )


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Best of several runs, at sizes that exceed the caches and take well under a second."""
    cuda = device.type == "cuda"
    clock = clock_for(device, cold=False)
    n = 8192 if cuda else 768
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    source = torch.zeros((1 << 30) if cuda else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allows_tf32() else "ieee"  # As convolutions are.
    try:
        product = _best(lambda: clock(lambda: torch.mm(a, b), 1))
    finally:
        matmul.fp32_precision = before
    copy = _best(lambda: clock(lambda: target.copy_(source), 1))
    return Peaks(tflops=2 * n**3 / product / 1e12, gbs=2 * source.numel() / copy / 1e9)


def _best(measure: Any, seconds: float = 0.3) -> float:
    measure()
    best, end = measure(), time.monotonic() + seconds
    while time.monotonic() < end:
        best = min(best, measure())
    return best


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}"


def _libraries(cuda: bool) -> str:
    if cuda:
        return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    found = re.search(r"(?:oneDNN|MKL-DNN)\)? v([\d.]+)", torch.__config__.show())
    return f"oneDNN {found.group(1)}" if found else "no oneDNN"


def _commit() -> str:
    """The commit, marked if the checkout differs from it; "unknown" outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + (" (changed since)" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
