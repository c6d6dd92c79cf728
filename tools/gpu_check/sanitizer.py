"""compute-sanitizer over the kernels' drivers: memcheck, racecheck, synccheck and initcheck, side by side.

A line is printed after each program. A tool counts only where it finds the fault that was planted for it: on some
machines it is there and cannot watch the device. The exit code is the number of tools that found something; NOT_RUN
where none did, and some did not run or end.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conformance import drivers, place

from .step import NOT_RUN, ROOT, add_until, left

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 99  # what compute-sanitizer exits with where it found something
CASES = 50


def find_sanitizer() -> str | None:
    """On PATH, or beside nvcc."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def build_faults() -> Path:
    """The program with planted faults."""
    nvcc = place.find_nvcc()
    assert nvcc is not None, "drivers were built, so nvcc is here"
    return place.built("faults", [nvcc, *place.code_flags()], [ROOT / "tests/conformance/faults.cu"])


def watch(sanitizer: str, tool: str, command: Sequence[str | Path], limit: float) -> tuple[int | None, str]:
    """(exit code, or None if it did not end in time, which is not a finding; output) of a command under a tool."""
    watched = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *map(str, command)]
    try:
        done = subprocess.run(watched, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None, f"did not end within {limit:.3g} s"
    return done.returncode, done.stdout + done.stderr


def check(sanitizer: str, tool: str, faults: Path, programs: dict[str, Path], until: float) -> str:
    """ "clean", "found" or "not run": what came of a tool. Each program is told of once it has run."""
    # Each program takes its share, at most, of what is left.
    code, text = watch(sanitizer, tool, [faults, tool], left(until) / (len(programs) + 1))
    if code != FOUND:
        why = f"it does not find the fault planted for it here (exit code {code}): {text[-400:]}"
        print(f"--- {tool}: not run: {why}", flush=True)
        return "not run"
    memory = "unwritten" if tool == "initcheck" else "poisoned"
    for i, (name, program) in enumerate(programs.items()):
        given: list[str | Path] = [program, *drivers.arguments_of(name, memory, CASES)]
        code, text = watch(sanitizer, tool, given, left(until) / (len(programs) - i))
        result = "not run" if code is None else "found" if code else "clean"
        print(f"--- {tool}, {name}: {result}, exit code {code}\n{text[-400 if code == 0 else -6000 :]}", flush=True)
        if code != 0:
            return result
    return "clean"


def main(arguments: list[str] | None = None) -> int:
    """Runs every tool; the last line is for all."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.sanitizer", description=__doc__)
    add_until(parser)
    until = parser.parse_args(arguments).until
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
        return NOT_RUN
    programs, faults = {name: drivers.build(name) for name in drivers.names()}, build_faults()
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        results = list(pool.map(lambda tool: check(sanitizer, tool, faults, programs, until), TOOLS))
    print(", ".join(f"{tool} {result}" for tool, result in zip(TOOLS, results)))
    return results.count("found") or (NOT_RUN if "not run" in results else 0)


if __name__ == "__main__":
    sys.exit(main())
