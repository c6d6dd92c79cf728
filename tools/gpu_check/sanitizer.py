"""compute-sanitizer over the kernels' drivers: memcheck, racecheck, synccheck and initcheck, side by side.

A tool counts only where it finds the fault that was planted for it: on some machines it is there and cannot watch the
device. The exit code is the number of tools that found something; NOT_RUN where none did, and some did not run or end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conformance import drivers, place

from .step import NOT_RUN, ROOT

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 99  # what compute-sanitizer exits with where it found something
SECONDS = 40.0
CASES = 50


def find_sanitizer() -> str | None:
    """On PATH, or beside nvcc."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def build_faults() -> Path:
    """The program with planted faults."""
    nvcc, out = place.find_nvcc(), drivers.OUT / "faults"
    assert nvcc is not None, "drivers were built, so nvcc is here"
    source = str(ROOT / "tests/conformance/faults.cu")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in place.ARCHS]
    done = subprocess.run([nvcc, *codes, source, "-o", str(out)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return out


def watch(sanitizer: str, tool: str, command: Sequence[str | Path]) -> tuple[int | None, str]:
    """(exit code, or None if it did not end in time, which is no finding; output) of a command under a tool."""
    watched = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *map(str, command)]
    try:
        done = subprocess.run(watched, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"did not end within {SECONDS:g} s"
    return done.returncode, done.stdout + done.stderr


def check(sanitizer: str, tool: str, faults: Path, programs: dict[str, Path]) -> tuple[str, str]:
    """("clean", "found" or "not run"; what was printed) of a tool."""
    code, text = watch(sanitizer, tool, [faults, tool])
    if code != FOUND:
        return "not run", f"it does not find the fault planted for it here (exit code {code}): {text[-400:]}"
    memory = "unwritten" if tool == "initcheck" else "poisoned"
    for name, program in programs.items():
        code, text = watch(sanitizer, tool, [program, *drivers.arguments_of(name, memory, CASES)])
        if code is None:
            return "not run", f"{name}: {text}"
        if code != 0:
            return "found", f"{name}, exit code {code}:\n{text[-6000:]}"
    return "clean", text[-400:]


def main() -> int:
    """Runs every tool and prints a line for each, and one for all."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
        return NOT_RUN
    programs, faults = {name: drivers.build(name) for name in drivers.names()}, build_faults()
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        results = dict(zip(TOOLS, pool.map(lambda tool: check(sanitizer, tool, faults, programs), TOOLS)))
    for tool, (result, text) in results.items():
        print(f"--- {tool}: {result}\n{text}")
    print(", ".join(f"{tool} {result}" for tool, (result, _) in results.items()))
    found = sum(result == "found" for result, _ in results.values())
    return found or (NOT_RUN if any(result == "not run" for result, _ in results.values()) else 0)


if __name__ == "__main__":
    sys.exit(main())
