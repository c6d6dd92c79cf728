"""Compiles what all steps run, side by side: then the seconds of a step are the device's.

The extension decides the exit code. What else could not be compiled, or not in time, is said; the step that needs it
compiles it, or fails by it.
"""

import argparse
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial

from .step import ROOT, add_until, left

EXTENSION = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
Part = Callable[[], object]


def beside(place: str) -> dict[str, Part]:
    """What needs nothing of the extension, by name."""
    from tests.conformance import place as probes

    from . import sanitizer

    return {"probes": probes.device_library, "planted faults": sanitizer.build_faults} if place == "cuda" else {}


def behind(place: str) -> dict[str, Part]:
    """What is linked with the kernels' objects, or is the emulator's own: once the extension is there."""
    from tests.conformance import drivers

    if place == "cuda":
        return {f"driver {name}": partial(drivers.build, name) for name in drivers.names()}
    return {"drivers": lambda: [drivers.emulated(name) for name in drivers.SOURCES]}  # of the same objects


class Parts:
    """Parts under way; none of them outlives the process, which may end before they do."""

    def __init__(self) -> None:
        self._threads: dict[str, threading.Thread] = {}
        self._failures: dict[str, str] = {}

    def start(self, find: Callable[[str], dict[str, Part]], place: str) -> None:
        try:
            parts = find(place)
        except ImportError as error:
            self._failures["programs of later steps"] = str(error)
            return
        for name, part in parts.items():
            self._threads[name] = threading.Thread(target=self._run, args=(name, part), daemon=True)
            self._threads[name].start()

    def _run(self, name: str, part: Part) -> None:
        try:
            part()
        except BaseException as error:  # pytest's skips are no Exceptions
            self._failures[name] = f"{type(error).__name__}: {error}"

    def wait(self, until: float) -> list[str]:
        """A line for each that is not there by then."""
        for name, thread in self._threads.items():
            thread.join(left(until))
            if thread.is_alive():
                self._failures[name] = "it was not ready in time"
        return [f"not compiled yet: {name}: {why}" for name, why in self._failures.items()]


def main(arguments: list[str] | None = None) -> int:
    """The exit code is the extension's."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.build", description=__doc__)
    parser.add_argument("--place", choices=("emulated", "cuda"), default="cuda")
    add_until(parser)
    options = parser.parse_args(arguments)
    emulator = ("--emulator",) if options.place == "emulated" else ()
    extension = subprocess.Popen((*EXTENSION, *emulator), cwd=ROOT)  # before this process imports torch
    parts = Parts()

    parts.start(beside, options.place)
    code = extension.wait()
    if code == 0:
        parts.start(behind, options.place)
    lines = parts.wait(options.until)
    print("\n".join([*lines, "the extension is built" if code == 0 else "the extension could not be built"]))
    return code


if __name__ == "__main__":
    sys.exit(main())
