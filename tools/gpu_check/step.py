"""A step is a command with a budget of time: it passes, fails, or says why it was not run.

A command is told the instant by which it must have ended, on the clock that all processes share; the limits of what it
starts are parts of what is left until then. So none of them is a number that could exceed the step's own.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[2]
# A command exits with this code to say that it could not run here; its last line says why. (automake's convention)
NOT_RUN = 77
LOG_BYTES = 1 << 20  # of a step, kept from the end
MERCY = 3.0  # seconds between asking a process to end and ending it
MARGIN = 25.0  # seconds for the tests under way at a step's end: the longest take as many on a busy machine
SPARE = 5.0  # seconds of a limit that a command is not told of: to end by itself, and to say so
ASKED = "asked to end from outside"


@dataclass(frozen=True)
class Step:
    """What to run.

    Attributes:
        name: as in the summary and on the command line.
        command: argv, run in the repository's root; "{until}" in it is `time.monotonic()` when it must have ended.
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
    if _running.ended:
        return Outcome(step.name, "not run", 0.0, f"the check was {ASKED}")
    limit = min(step.budget, seconds)
    if limit <= 0:
        return Outcome(step.name, "not run", 0.0, "no time was left")
    start = time.monotonic()
    command = [part.replace("{until}", f"{start + limit - SPARE:.3f}") for part in step.command]
    try:
        code, log = call(command, limit)
    except OSError as error:
        return Outcome(step.name, "failed", 0.0, f"{command[0]}: {error.strerror}")
    took = time.monotonic() - start
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = lines[-1][:200] if lines else "it printed nothing"
    if _running.ended:
        return Outcome(step.name, "failed", took, f"{ASKED} after {took:.0f} s; last: {last}", log)
    if code is None:
        return Outcome(step.name, "failed", took, f"ended after {limit:.0f} s, which is its budget; last: {last}", log)
    if code == NOT_RUN:
        return Outcome(step.name, "not run", took, last, log)
    return Outcome(step.name, "failed" if code else "passed", took, f"exit code {code}: {last}" if code else last, log)


def add_until(parser: argparse.ArgumentParser) -> None:
    """The argument by which a command is told its end; without one it has ten minutes."""
    parser.add_argument(
        "--until",
        type=float,
        default=time.monotonic() + 600,
        metavar="INSTANT",
        help="time.monotonic() when all must have ended; by default in ten minutes",
    )


def left(until: float) -> float:
    """Seconds until then, never negative."""
    return max(0.0, until - time.monotonic())


def call(command: Sequence[str], limit: float, errors: int = subprocess.STDOUT) -> tuple[int | None, str]:
    """(Exit code, None if it did not end in time; the end of its output, with what it says on stderr or without).

    Raises:
        OSError: if there is no such program.
    """
    with tempfile.TemporaryFile() as output:
        code = _wait(command, limit, output, errors)
        output.seek(max(0, output.seek(0, os.SEEK_END) - LOG_BYTES))
        return code, output.read().decode(errors="replace")


def _wait(command: Sequence[str], limit: float, output: BinaryIO, errors: int) -> int | None:
    """The exit code, or None if the command did not end in time; nothing that it started survives it."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=output,
        stderr=errors,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # What it said before it was ended is known, and it may say it in any characters.
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "LC_ALL": "C.UTF-8"},
    )
    _running.processes.append(process)
    try:
        return None if _running.ended else process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _running.processes.remove(process)
        _end_group(process)


@dataclass
class _Running:
    """What would outlive this process, since it has sessions of its own; whether the check has been asked to end."""

    processes: list[subprocess.Popen[bytes]]
    ended: bool = False


_running = _Running([])


def was_asked_to_end() -> bool:
    """Whether a signal has said so within `ended_when_asked`."""
    return _running.ended


@contextlib.contextmanager
def ended_when_asked() -> Iterator[None]:
    """Within it SIGTERM, Ctrl-C and a terminal that closes, but under nohup, end what runs, with all that it started.

    What comes after it is not run.

    So whoever takes the machine away gets the folder with all that is known, and no process is left on the GPU.
    """

    def end(*_: object) -> None:
        _running.ended = True
        for process in list(_running.processes):
            _end_group(process)

    _running.ended = False
    asks = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        asks.append(signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in asks}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Its session: workers of pytest and compilers too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(MERCY)
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(MERCY)  # One that a driver holds outlasts even this: it is left behind, and the check goes on.
