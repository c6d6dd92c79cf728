"""Measured choices: which of ATen and freezekit's kernels is faster for the problems of a model, on this device."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal

import torch

import freezekit
import freezekit._C as _C

Candidate = Literal["native", "emulated"]


@dataclass(frozen=True)
class Measurement:
    """One problem, measured.

    Attributes:
        problem: operator, dtype, sizes, settings, layout and kind of device.
        aten_seconds, native_seconds: medians of interleaved runs.
        agree: whether both results are equal within rounding; where they are not, ATen is taken.
    """

    problem: str
    aten_seconds: float
    native_seconds: float
    agree: bool

    @property
    def backend(self) -> str:
        """What `auto` takes from now on: "aten" or "native"."""
        return "native" if self.agree and self.native_seconds < self.aten_seconds else "aten"


class autotune:
    """Context manager: within it, every problem that backend "auto" meets is measured once, and the faster way taken.

    Without it "auto" takes ATen. What was measured holds for the whole process, after the block too; `to_json` and
    `load_choices` carry it to the next one on the same kind of device. A problem is an operator with its sizes,
    settings, dtype and layout; where both results differ by more than rounding, ATen is taken. A problem that is met
    while a CUDA graph is being captured is not measured. On a CPU there is nothing to choose from, and nothing is
    measured.

    Args:
        candidate: whose kernels are measured against ATen's: "native", or "emulated" for tests on a CPU.

    Raises:
        ValueError: if `candidate` is neither.

    >>> import torch, freezekit as fk
    >>> with fk.tuning.autotune(candidate="emulated") as tuned:
    ...     _ = fk.functional.conv2d(torch.ones(1, 2, 5, 5), torch.ones(2, 2, 3, 3))
    >>> [choice.agree for choice in tuned.measurements]
    [True]
    >>> fk.tuning.clear_choices()
    """

    def __init__(self, candidate: Candidate = "native") -> None:
        if candidate not in ("native", "emulated"):
            raise ValueError(f"candidate must be 'native' or 'emulated', got {candidate!r}")
        self.candidate = candidate

    def __enter__(self) -> autotune:
        _C.choices.tune(self.candidate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _C.choices.stop()

    @property
    def measurements(self) -> list[Measurement]:
        """All that is known in this process, in order of the problem's text."""
        return [Measurement(*row) for row in _C.choices.all()]

    def to_json(self) -> str:
        """`{"measured_with": {...}, "choices": [...]}`: versions and device; objects with `Measurement`'s fields."""
        choices = [asdict(measurement) for measurement in self.measurements]
        return json.dumps({"measured_with": _here(), "choices": choices}, indent=1)


def load_choices(text: str) -> None:
    """Adds choices that `autotune.to_json` exported, to those of this process.

    Args:
        text: an export from the same versions of freezekit, torch and cuDNN on the same kind of device: times measured
            with others say nothing here.

    Raises:
        ValueError: if the text is not such an export, or not from here; nothing is loaded then.
        TypeError: if it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    try:
        document = json.loads(text)
        there, rows = dict(document["measured_with"]), [Measurement(**row) for row in document["choices"]]
        for row in rows:
            _check(row)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"text must be what autotune.to_json() gave, got {text[:60]!r}: {error!r}") from error
    here = _here()
    if differing := [name for name in here if there.get(name, "unknown") != here[name]]:
        facts = ", ".join(f"{name} {there.get(name, 'unknown')!r} (here {here[name]!r})" for name in differing)
        raise ValueError(f"text must hold choices measured here, got some measured with {facts}: measure them again")
    for row in rows:
        _C.choices.set(row.problem, row.aten_seconds, row.native_seconds, row.agree)


def clear_choices() -> None:
    """Forgets every measured choice: "auto" takes ATen again."""
    _C.choices.clear()


def _here() -> dict[str, Any]:
    """What a measured time depends on beside the problem."""
    cuda = torch.cuda.is_available()
    return {
        "freezekit": freezekit.__version__,
        "torch": str(torch.__version__),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
    }


def _check(row: Measurement) -> None:
    seconds = (row.aten_seconds, row.native_seconds)
    if not isinstance(row.problem, str) or not isinstance(row.agree, bool):
        raise TypeError(f"problem must be text and agree true or false, got {row}")
    if not all(isinstance(s, (int, float)) and 0 <= s < float("inf") for s in seconds):
        raise ValueError(f"seconds must be non-negative numbers, got {row}")
