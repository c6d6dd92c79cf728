"""A step is a command with a budget of time: it passes, fails, or says why it was not run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[2]
# A command exits with this code to say that it could not run here; its last line says why. (automake's convention)
NOT_RUN = 77
LOG_BYTES = 1 << 20  # of a step, kept from the end
MERCY = 3.0  # seconds between asking a process to end and ending it


@dataclass(frozen=True)
class Step:
    """What to run.

    Attributes:
        name: as in the summary and on the command line.
        command: argv, run in the repository's root; "{seconds}" in it is the time that it has.
        budget: seconds; a command that takes longer is ended, with all that it started.
        not_here: why it cannot run on this machine; empty if it can.
    """

    name: str
    command: tuple[str, ...]
    budget: float
    not_here: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        result: "passed", "failed" or "not run".
        said: why it failed or was not run; of a pass, the last line that the command printed.
        log: the end of its output.
    """

    step: str
    result: str
    seconds: float
    said: str
    log: str = ""


def run(step: Step, seconds: float) -> Outcome:
    """Runs a step for at most its budget, and at most `seconds`, which are what is left of the whole."""
    if step.not_here:
        return Outcome(step.name, "not run", 0.0, step.not_here)
    limit = min(step.budget, seconds)
    if limit <= 0:
        return Outcome(step.name, "not run", 0.0, "no time was left")
    start, command = time.monotonic(), [part.replace("{seconds}", f"{limit:.0f}") for part in step.command]
    with tempfile.TemporaryFile() as output:
        try:
            code = _wait(command, limit, output)
        except OSError as error:
            return Outcome(step.name, "failed", 0.0, f"{command[0]}: {error.strerror}")
        took = time.monotonic() - start
        output.seek(max(0, output.seek(0, os.SEEK_END) - LOG_BYTES))
        log = output.read().decode(errors="replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = lines[-1][:200] if lines else "it printed nothing"
    if code is None:
        return Outcome(step.name, "failed", took, f"ended after {limit:.0f} s, which is its budget; last: {last}", log)
    if code == NOT_RUN:
        return Outcome(step.name, "not run", took, last, log)
    return Outcome(step.name, "failed" if code else "passed", took, f"exit code {code}: {last}" if code else last, log)


def _wait(command: list[str], limit: float, output: BinaryIO) -> int | None:
    """The exit code, or None if the command did not end in time; nothing that it started survives it."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Its session: workers of pytest and compilers too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(MERCY)
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(MERCY)  # One that a driver holds outlasts even this: it is left behind, and the check goes on.
