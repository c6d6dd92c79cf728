"""Where a check ran: device, driver, versions, commit; and what is missing here."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass

from .step import ROOT

# What the steps import or call, beyond the standard library.
MODULES = ("torch", "numpy", "rich", "pybind11", "setuptools", "pytest", "hypothesis")
PROGRAMS = ("g++", "ninja", "nvcc")
# Made use of where they are there.
OPTIONAL = ("xdist", "matplotlib", "expecttest", "sklearn", "timm", "torchvision")


@dataclass(frozen=True)
class Host:
    """Facts for a row of docs/hardware.md. `device` is empty where torch sees none."""

    date: str
    device: str
    driver: str
    torch: str
    cuda: str
    nvcc: str
    python: str
    cores: int
    commit: str
    arch: str = ""  # of the device, as nvcc names it

    def to_dict(self) -> dict[str, str | int]:
        """Plain data, ready for JSON."""
        return asdict(self)


def output_of(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def read(commit: str | None) -> Host:
    """Looks around. torch is asked in a process of its own: this one must not hold a context on the device."""
    asked = output_of(
        sys.executable,
        "-c",
        "import torch; print(torch.__version__, torch.version.cuda or 'none', sep='\\n');"
        "there = torch.cuda.is_available()\n"
        "print(torch.cuda.get_device_name() if there else '')\n"
        "print('%d%d' % torch.cuda.get_device_capability() if there else '')",
    ).split("\n")
    torch, cuda, device, capability = [*asked, "", "", "", ""][:4]
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    found = re.search(r"\bV([\d.]+)", output_of("nvcc", "--version"))
    dirty = "+" if output_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    known = output_of("git", "rev-parse", "--short", "HEAD")
    return Host(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        device=device,
        driver=driver or "none",
        torch=torch or "none",
        cuda=cuda or "none",
        nvcc=found[1] if found else "none",
        python=platform.python_version(),
        cores=os.cpu_count() or 1,
        arch="90a" if capability == "90" else capability,
        commit=commit or (known + dirty if known else "unknown"),
    )


def missing() -> list[str]:
    """What the steps cannot do without, and is not here."""
    modules = [name for name in MODULES if importlib.util.find_spec(name) is None]
    return modules + [name for name in PROGRAMS if shutil.which(name) is None]


def main() -> int:
    """Prints what is here; the exit code is the number of things that are missing."""
    lacking = missing()
    for name in OPTIONAL:
        print(f"{name}: {'there' if importlib.util.find_spec(name) else 'not there, done without'}")
    print(output_of("nvidia-smi") or "nvidia-smi: not there")
    print(f"missing: {', '.join(lacking)}" if lacking else "nothing that is needed is missing")
    return len(lacking)


if __name__ == "__main__":
    sys.exit(main())
