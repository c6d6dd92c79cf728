"""What a probe is: one instruction behind a ptx:: wrapper, run on seeded inputs, and what it must give."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]


class Launch(Protocol):
    """Runs probe_<name> of the probes' library and waits for it; arrays are read and written in place."""

    def __call__(self, name: str, *arguments: object) -> None: ...


@dataclass(frozen=True)
class Probe:
    """One question to the hardware.

    Attributes:
        inputs: makes the operands; seeded, the same on every machine.
        run: hands them to the instruction and gives back what it wrote.
        expected: what the PTX ISA says about it, computed without the instruction.
        bound: largest difference from `expected`, by name, where hardware rounds in ways of its own; others are exact.
        needs: compute capability, 80 for sm_80.
        emulated: whether csrc/emulator has the instruction.
    """

    name: str
    inputs: Callable[[], Arrays]
    run: Callable[[Launch, Arrays], Arrays]
    expected: Callable[[Arrays], Arrays]
    bound: Callable[[Arrays], Arrays] = lambda inputs: {}
    needs: int = 80
    emulated: bool = True


def digest(arrays: Arrays) -> str:
    """Names the contents, so that recorded results are held against results of the same inputs alone."""
    state = hashlib.sha256()
    for name in sorted(arrays):
        state.update(name.encode() + str(arrays[name].dtype).encode() + str(arrays[name].shape).encode())
        state.update(np.ascontiguousarray(arrays[name]).tobytes())
    return state.hexdigest()[:16]


def differences(actual: Arrays, expected: Arrays, bound: Arrays) -> list[str]:
    """One sentence for each array that is not what it must be; values that are NaN in both are equal."""
    if actual.keys() != expected.keys():
        return [f"gave {sorted(actual)}, expected {sorted(expected)}"]
    found = []
    for name, right in expected.items():
        given = actual[name]
        if given.shape != right.shape or given.dtype != right.dtype:
            found.append(f"{name} is {given.dtype}{given.shape}, expected {right.dtype}{right.shape}")
            continue
        nan = np.isnan(given) & np.isnan(right) if given.dtype.kind == "f" else np.zeros(given.shape, bool)
        with np.errstate(invalid="ignore"):
            far = np.abs(given.astype(np.float64) - right.astype(np.float64)) > bound.get(name, 0.0)
        wrong = np.argwhere((far if name in bound else given != right) & ~nan)
        if len(wrong):
            at = tuple(map(int, wrong[0]))
            found.append(
                f"{name}: {len(wrong)} of {given.size} differ, first at {at}: {given[at]!s}, expected {right[at]!s}"
            )
    return found
