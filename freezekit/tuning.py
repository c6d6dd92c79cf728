"""Measured choices: which of ATen and freezekit's kernels is faster for the problems of a model, on this device."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Literal

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
    `load_choices` carry it to the next one on the same kind of device. A problem that is met while a CUDA graph is
    being captured is not measured. On a CPU there is nothing to choose from, and nothing is measured.

    Args:
        candidate: whose kernels are measured against ATen's: "native", or "emulated" for tests on a CPU.

    Raises:
        ValueError: if `candidate` is neither.

    >>> import torch, freezekit as fk
    >>> with fk.autotune(candidate="emulated") as tuned:
    ...     _ = fk.conv2d(torch.ones(1, 2, 5, 5), torch.ones(2, 2, 3, 3))
    >>> [choice.agree for choice in tuned.measurements]
    [True]
    >>> fk.clear_choices()
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
        """A list of objects with `Measurement`'s fields."""
        return json.dumps([asdict(measurement) for measurement in self.measurements], indent=1)


def load_choices(text: str) -> None:
    """Adds choices that `autotune.to_json` exported, in this process, on the same kind of device.

    Raises:
        ValueError: if the text is not such an export; nothing is loaded then.
    """
    try:
        rows = [Measurement(**row) for row in json.loads(text)]
        checked = [(str(r.problem), float(r.aten_seconds), float(r.native_seconds), bool(r.agree)) for r in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"text must be what autotune.to_json() gave, got {text[:60]!r}: {error}") from error
    for row in checked:
        _C.choices.set(*row)


def clear_choices() -> None:
    """Forgets every measured choice: "auto" takes ATen again."""
    _C.choices.clear()
