"""Where a check ran: device, driver, versions, commit; and what is missing here."""

import argparse
import datetime
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .step import ASKED, add_until, call, left, was_asked_to_end

# What the steps import or call, beyond the standard library.
MODULES = ("torch", "numpy", "rich", "pybind11", "setuptools", "pytest", "hypothesis")
PROGRAMS = ("g++", "ninja", "nvcc")
# Made use of where they are there.
OPTIONAL = ("xdist", "jsonschema", "matplotlib", "expecttest", "sklearn", "timm", "torchvision")
ASK_TORCH = """
import torch
there = torch.cuda.is_available()
print(torch.__version__, torch.version.cuda or "none", sep="\\n")
print(torch.cuda.get_device_name() if there else "")
print("%d%d" % torch.cuda.get_device_capability() if there else "")
"""


@dataclass(frozen=True)
class Host:
    """Facts for a row of docs/hardware.md. `device` is empty where torch sees none, not where torch gave no answer."""

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


def output_of(seconds: float, *command: str) -> str | None:
    """What a command prints; None where it is missing, fails or does not end in time."""
    try:
        code, text = call(command, seconds, errors=subprocess.DEVNULL)
    except OSError:
        return None
    return text.strip() if code == 0 else None


def read(commit: str | None, seconds: float) -> Host:
    """Looks around for at most `seconds`: what has not answered by then is not known, and no reason to give up.

    torch is asked in a process of its own: this one must not hold a context on the device.
    """
    questions = (
        (sys.executable, "-c", ASK_TORCH),
        ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        ("nvcc", "--version"),
        ("git", "status", "--porcelain", "--untracked-files=no"),
        ("git", "rev-parse", "--short", "HEAD"),
    )
    with ThreadPoolExecutor(len(questions)) as pool:
        asked, driver, nvcc, changes, known = pool.map(lambda question: output_of(seconds, *question), questions)
    torch, cuda, device, capability = [*(asked or "").split("\n"), "", "", "", ""][:4]
    if asked is None:
        device = f"unknown: {ASKED if was_asked_to_end() else f'torch failed, or gave no answer in {seconds:g} s'}"
    found = re.search(r"\bV([\d.]+)", nvcc or "")
    return Host(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        device=device,
        driver=(driver or "none").split("\n")[0],
        torch=torch or "none",
        cuda=cuda or "none",
        nvcc=found[1] if found else "none",
        python=platform.python_version(),
        cores=os.cpu_count() or 1,
        arch="90a" if capability == "90" else capability,
        commit=commit or (known + ("+" if changes else "") if known else "unknown"),
    )


def missing() -> list[str]:
    """What the steps cannot do without, and is not here."""
    modules = [name for name in MODULES if importlib.util.find_spec(name) is None]
    return modules + [name for name in PROGRAMS if shutil.which(name) is None]


def main(arguments: list[str] | None = None) -> int:
    """Prints what is here; the exit code is the number of things that are missing."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.machine", description=__doc__)
    add_until(parser)
    until = parser.parse_args(arguments).until
    lacking = missing()
    for name in OPTIONAL:
        print(f"{name}: {'there' if importlib.util.find_spec(name) else 'not there, done without'}")
    print(output_of(left(until), "nvidia-smi") or "nvidia-smi: not there, or no answer")
    print(f"missing: {', '.join(lacking)}" if lacking else "nothing that is needed is missing")
    return len(lacking)


if __name__ == "__main__":
    sys.exit(main())
