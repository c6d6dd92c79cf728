"""`python -m tests.conformance`: does the hardware do what the ptx:: wrappers, and the emulator, say it does?

On a GPU probes run in a few processes side by side, all of sm_80's in one; where a probe faults or hangs its process
ends and those behind it run in another. The exit code is the number of probes that failed. With --golden FILE results
are kept, from the first probe on; a GPU's belong in tests/conformance/golden.npz.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from tools.gpu_check.step import add_until, left

from . import golden, place, registry
from .probe import Arrays, Probe, differences

ROOT = Path(__file__).resolve().parents[2]
DONE, WRONG = "done: ", "wrong: "  # what a process says once a probe's results are kept
Ran = tuple[Probe, str, Arrays]  # a probe, why it failed or "", its results


def run_here(probe: Probe, where: str) -> tuple[str, Arrays]:
    """(how the results differ from what is expected, or ""; the results) of the probe in this process."""
    inputs = probe.inputs()
    actual = probe.run(place.PLACES[where], inputs)
    return "\n".join(differences(actual, probe.expected(inputs), probe.bound(inputs))), actual


def run_apart(probes: Sequence[Probe], where: str, until: float, folder: Path) -> Iterator[Ran]:
    """The same of several probes, in one process after another: one that faults or hangs ends its process alone."""
    waiting = list(probes)
    while waiting:
        if time.monotonic() >= until:
            yield from ((probe, "not run: no time was left", {}) for probe in waiting)
            return
        command = [sys.executable, "-u", "-m", "tests.conformance", "--place", where, "--until", str(until)]
        command += ["--into", str(folder), "--these", *(probe.name for probe in waiting)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert child.stdout is not None
        said: list[str] = []
        for line in child.stdout:
            if line.rstrip() not in (DONE + waiting[0].name, WRONG + waiting[0].name):
                said.append(line)
                continue
            failure = "".join(said).strip()[-2000:] if line.startswith(WRONG) else ""
            with np.load(folder / f"{waiting[0].name}.npz", allow_pickle=False) as file:
                yield waiting.pop(0), failure, dict(file)
            said = []
            if not waiting:
                break
        code = child.wait()
        if waiting:
            hung = "did not end in half of the time left" if code == -signal.SIGALRM else f"exit code {code}"
            yield waiting.pop(0), "\n".join(filter(None, ["".join(said).strip()[-2000:], hung])), {}


def run_these(probes: Sequence[Probe], where: str, until: float, folder: Path) -> None:
    """What a process of run_apart does: results are in the folder before a line says so."""
    for probe in probes:
        # Not an exception but the end of the process: a thread that waits for a GPU runs no handler. The other half of
        # what is left is for those that wait behind a probe that hangs. (A timer of 0 would be none.)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, left(until) / 2))
        failure, arrays = run_here(probe, where)
        np.savez(folder / f"{probe.name}.npz", **arrays)
        print(f"{failure}\n{WRONG}{probe.name}" if failure else DONE + probe.name)
    signal.setitimer(signal.ITIMER_REAL, 0)


def groups(probes: Sequence[Probe]) -> list[list[Probe]]:
    """What shares a process: probes of sm_80, and those of a family of sm_90, which may spoil each other."""
    found: dict[str, list[Probe]] = {}
    for probe in probes:
        family = "sm_80" if probe.needs < 90 else "_".join(probe.name.split("_")[:2])
        found.setdefault(family if not family.startswith("wgmma") else "wgmma", []).append(probe)
    return list(found.values())


def run_all(probes: Sequence[Probe], where: str, until: float) -> Iterator[Ran]:
    """The same of all, each as soon as it has run; the emulator reports what a GPU would die of."""
    if where == "emulated":
        yield from ((probe, *run_here(probe, where)) for probe in probes)
        return
    ready: SimpleQueue[Ran | None] = SimpleQueue()

    def run_group(group: list[Probe], folder: Path) -> None:
        try:
            for ran in run_apart(group, where, until, folder):
                ready.put(ran)
        finally:
            ready.put(None)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(groups(probes)) or 1) as pool:
        jobs = [pool.submit(run_group, group, Path(folder)) for group in groups(probes)]
        running = len(jobs)
        while running:
            ran = ready.get()
            running -= ran is None
            if ran is not None:
                yield ran
        for job in jobs:
            job.result()


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
    """The command line; returns the number of probes that failed, at most 125; a file that cannot be written counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument(
        "--place", choices=tuple(place.PLACES), default="cuda" if torch.cuda.is_available() else "emulated"
    )
    parser.add_argument("--golden", type=Path, metavar="FILE", help="keep the results")
    parser.add_argument("--about", default="", help="a line kept with them: date, driver, commit")
    add_until(parser)
    parser.add_argument("--these", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.place == "cuda" and not torch.cuda.is_available():
        parser.error("argument --place: torch sees no CUDA device here")
    probes = list(registry.probes())
    if options.these:
        by_name = {probe.name: probe for probe in probes}
        run_these([by_name[name] for name in options.these], options.place, options.until, options.into)
        return 0
    about = {**describe(options.place), "note": options.about}
    print(f"conformance of the ptx:: wrappers: {options.place}, {about.get('device', 'this CPU')}, sm_{about['sm']}")
    if options.place == "cuda":
        place.device_library()  # once, before processes ask for it
    runnable = [probe for probe in probes if not why_not(probe, options.place, about["sm"])]
    for probe in probes:
        if probe not in runnable:
            print(f"not run  {probe.name}: {why_not(probe, options.place, about['sm'])}")
    failed, results, unwritten = 0, {}, ""
    for probe, failure, arrays in run_all(runnable, options.place, options.until):
        if arrays:
            results[probe.name] = arrays
        failed += bool(failure)
        if options.golden:
            unwritten = ""
            try:
                golden.save(options.golden, about, results, probes)
            except OSError as error:  # of a full disk: what the probes behind it give is told all the same
                unwritten = f"; {options.golden} is not written: {error.strerror}"
        print(f"{'FAILED' if failure else 'passed'}   {probe.name}{': ' + failure if failure else ''}", flush=True)
    print(f"{len(runnable) - failed} passed, {failed} failed, {len(probes) - len(runnable)} not run{unwritten}")
    return min(failed + bool(unwritten), 125)


if __name__ == "__main__":
    sys.exit(main())
