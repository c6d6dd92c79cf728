"""`python -m tests.conformance`: does the hardware do what the ptx:: wrappers, and the emulator, say it does?

On a GPU every probe runs in a process of its own, so that one that faults or hangs spoils no other. The exit code is
the number of probes that failed. With --golden FILE results are kept; a GPU's belong in tests/conformance/golden.npz.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import golden, place, registry
from .probe import Arrays, Probe, differences

ROOT = Path(__file__).resolve().parents[2]


def run_here(probe: Probe, where: str) -> tuple[str, Arrays]:
    """(how the results differ from what is expected, or ""; the results) of the probe in this process."""
    inputs = probe.inputs()
    actual = probe.run(place.PLACES[where], inputs)
    return "\n".join(differences(actual, probe.expected(inputs), probe.bound(inputs))), actual


def run_apart(probe: Probe, where: str, seconds: float, folder: Path) -> tuple[str, Arrays]:
    """(why it failed or "", its results) of the probe in a process of its own."""
    results = folder / f"{probe.name}.npz"
    command = [sys.executable, "-m", "tests.conformance", "--place", where, "--one", probe.name, str(results)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        failure = "" if done.returncode == 0 else (done.stdout + done.stderr).strip()[-2000:] or "no output"
    except subprocess.TimeoutExpired:
        failure = f"did not end within {seconds:g} s"
    if not results.exists():
        return failure or "gave no results", {}
    with np.load(results, allow_pickle=False) as file:
        return failure, dict(file)


def run_all(probes: list[Probe], where: str, seconds: float) -> Iterator[tuple[Probe, str, Arrays]]:
    """(probe, why it failed or "", its results) of each; the emulator reports what a GPU would die of."""
    if where == "emulated":
        yield from ((probe, *run_here(probe, where)) for probe in probes)
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(run_apart, probe, where, seconds, Path(folder)) for probe in probes]
        yield from ((probe, *job.result()) for probe, job in zip(probes, jobs))


def why_not(probe: Probe, where: str, sm: int) -> str:
    """Why a probe cannot run there; empty if it can."""
    if where == "emulated":
        return "" if probe.emulated else "the emulator has no such instruction"
    return "" if sm >= probe.needs else f"needs sm_{probe.needs}, the device is sm_{sm}"


def describe(where: str) -> dict[str, Any]:
    """What the results were made on."""
    if where == "emulated":
        return {"place": where, "sm": 80}
    major, minor = torch.cuda.get_device_capability()
    return {
        "place": where,
        "sm": 10 * major + minor,
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the number of probes that failed, at most 125."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument(
        "--place", choices=tuple(place.PLACES), default="cuda" if torch.cuda.is_available() else "emulated"
    )
    parser.add_argument("--golden", type=Path, metavar="FILE", help="keep the results")
    parser.add_argument("--about", default="", help="a line kept with them: date, driver, commit")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each probe")
    parser.add_argument("--one", nargs=2, metavar=("PROBE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    probes = list(registry.probes())
    if options.one:
        chosen = next(p for p in probes if p.name == options.one[0])
        failure, arrays = run_here(chosen, options.place)
        np.savez(options.one[1], **arrays)
        print(failure)
        return 1 if failure else 0
    about = {**describe(options.place), "note": options.about}
    print(f"conformance of the ptx:: wrappers: {options.place}, {about.get('device', 'this CPU')}, sm_{about['sm']}")
    if options.place == "cuda":
        place.device_library()  # once, before processes ask for it
    runnable = [probe for probe in probes if not why_not(probe, options.place, about["sm"])]
    for probe in probes:
        if probe not in runnable:
            print(f"not run  {probe.name}: {why_not(probe, options.place, about['sm'])}")
    failed, results = 0, {}
    for probe, failure, arrays in run_all(runnable, options.place, options.seconds):
        if arrays:
            results[probe.name] = arrays
        failed += bool(failure)
        print(f"{'FAILED' if failure else 'passed'}   {probe.name}{': ' + failure if failure else ''}", flush=True)
    if options.golden:
        golden.save(options.golden, about, results, probes)
    print(f"{len(runnable) - failed} passed, {failed} failed, {len(probes) - len(runnable)} not run")
    return min(failed, 125)


if __name__ == "__main__":
    sys.exit(main())
