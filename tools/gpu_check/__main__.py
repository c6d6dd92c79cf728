"""Runs every step, each within its budget and whatever became of those before it: `make gpu-check`.

The exit code is the number of steps that failed, and at least 1 where none passed and where the check was asked to end
(SIGTERM, Ctrl-C, a terminal that closes).
Without a GPU there is nothing to check; --emulated exercises the steps all the same, which says nothing about hardware.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import machine, report, steps
from .step import Outcome, Step, ended_when_asked, run, was_asked_to_end

SECONDS = 530.0  # of the whole: under nine minutes
FIRST_LOOK = 30.0  # of those, for what the machine is


def say(text: str) -> None:
    """Prints a line. Whoever read them may be gone, or the disk full: the folder has the results all the same."""
    try:
        encoding = sys.stdout.encoding or "ascii"  # which may not have all that a command printed
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer, too


def run_all(plan: Sequence[Step], folder: Path, here: machine.Host, command: str, seconds: float) -> list[Outcome]:
    """Runs the steps in order; the folder holds what is known after each."""
    end, outcomes = time.monotonic() + seconds, list[Outcome]()
    keep(folder, here, outcomes, command)
    for step in plan:
        outcome = run(step, end - time.monotonic())
        outcomes.append(outcome)
        keep(folder, here, outcomes, command)
        say(f"{outcome.seconds:4.0f} s  {outcome.result:8} {outcome.step}: {outcome.said}")
    if too_much := report.check_size(folder):
        outcomes.append(Outcome("size of the results", "failed", 0.0, too_much))
        keep(folder, here, outcomes, command)
    return outcomes


def keep(folder: Path, here: machine.Host, outcomes: Sequence[Outcome], command: str) -> None:
    """Writes what is known; where that fails, on a full disk, what was written before stays, and the check goes on."""
    try:
        report.write(folder, here, outcomes, command)
    except OSError as error:
        say(f"the results are not in {folder}: {error.strerror}")


def find_cuda() -> None:
    """Puts the toolkit in CUDA_HOME, or in its usual place, on PATH, as those who install one often leave to others."""
    tools = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    if shutil.which("nvcc") is None and (tools / "nvcc").exists():
        os.environ["PATH"] += f"{os.pathsep}{tools}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's text."""
    with ended_when_asked():
        return check(arguments)


def check(arguments: list[str] | None) -> int:
    """The same, as long as nobody asks it to end."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-check"),
        metavar="DIR",
        help="for the results; older ones there are removed",
    )
    parser.add_argument("--emulated", action="store_true", help="without a GPU: prove the steps, not the hardware")
    parser.add_argument("--only", help="names of steps, with commas")
    parser.add_argument("--commit", help="of the sources, where there is no git to ask")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    find_cuda()
    here = machine.read(options.commit, min(FIRST_LOOK, options.seconds))
    if not here.device and not options.emulated:
        say(
            f"torch {here.torch} for CUDA {here.cuda} sees no CUDA device here, with driver {here.driver}; "
            "--emulated (make gpu-check EMULATED=1) exercises the steps without one"
        )
        return 1
    folder = options.out.resolve()
    try:
        is_ours = report.empty(folder)
    except OSError as error:
        parser.error(f"argument --out: {folder} cannot be made: {error.strerror}")
    if not is_ours:
        parser.error(f"argument --out: {folder} holds files that are not results of gpu-check")
    plan = steps.plan(folder, options.emulated, f"{here.date}, driver {here.driver}, commit {here.commit}", here.arch)
    if options.only:
        wanted = options.only.split(",")
        if unknown := set(wanted) - {step.name for step in plan}:
            parser.error(f"argument --only: no such step: {', '.join(sorted(unknown))}")
        plan = [step for step in plan if step.name in wanted]
    command = "make gpu-check" + (" EMULATED=1" if options.emulated else "")
    say(f"{here.device or 'no CUDA device'}, driver {here.driver}, torch {here.torch}, commit {here.commit}")
    outcomes = run_all(plan, folder, here, command, end - time.monotonic())
    say("\n" + report.row(here, outcomes, command) + f"\n\nresults in {folder}")
    results = [outcome.result for outcome in outcomes]
    return min(125, max(results.count("failed"), int("passed" not in results or was_asked_to_end())))


if __name__ == "__main__":
    sys.exit(main())
