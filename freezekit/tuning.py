"""What `auto` has decided on a GPU: where freezekit's kernels were equal to torch's operators and not slower.

At a kernel's first call on a device and a dtype, it and torch's operator compute the same; results are compared,
then both are timed. Convolutions are decided one by one where `torch.backends.cudnn.benchmark` is set, else for a
class of problems at once. Choices hold for the process; `dump_choices` and `load_choices` carry them to the next.

The kernels for sm_90a are candidates only where choices that `freezekit selftest --hopper --save-choices FILE` wrote
on such a GPU were loaded.
"""

import json
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

import freezekit
import freezekit._C as _C


@dataclass(frozen=True)
class Choice:
    """One decision.

    Attributes:
        problem: the layer, or the convolution's operator with its sizes or the class of them; dtype, layout and device.
            Or the self-test of the kernels for sm_90a on this device.
        aten_seconds, native_seconds: medians of interleaved runs of torch's operator and of freezekit's kernel; both 0
            where nothing was timed.
        agree: whether the results are equal, sums within the bound of their rounding.
        note: what differed, or why nothing could be compared; "" where they agree.
    """

    problem: str
    aten_seconds: float
    native_seconds: float
    agree: bool
    note: str = ""

    @property
    def backend(self) -> str:
        """What `auto` takes: "native" where the results agree and freezekit's kernel is not slower, else "aten"."""
        return "native" if self.agree and self.native_seconds <= self.aten_seconds else "aten"

    def __str__(self) -> str:
        if not self.agree:
            return f"{self.problem}: aten, {self.note}"
        if not self.aten_seconds and not self.native_seconds:
            return f"{self.problem}: passed"
        times = f"ATen {1e6 * self.aten_seconds:.4g} us, own kernel {1e6 * self.native_seconds:.4g} us"
        return f"{self.problem}: {self.backend}, {times}"


def choices() -> list[Choice]:
    """All that was decided or loaded in this process, in order of the problem's text; empty on a CPU.

    >>> choices()
    []
    """
    return [Choice(*row) for row in _C.choices.all()]


def dump_choices() -> str:
    """`{"measured_with": {...}, "choices": [...]}`: versions and device; objects with `Choice`'s fields.

    What could not be compared is left out, for want of memory, of code for this device or of numbers that tell:
    another process may have them.

    >>> import json
    >>> sorted(json.loads(dump_choices()))
    ['choices', 'measured_with']
    """
    lasting = [asdict(choice) for choice in choices() if choice.note not in _C.choices.passing_notes]
    return json.dumps({"measured_with": _here(), "choices": lasting}, indent=1)


def load_choices(text: str) -> None:
    """Adds choices that `dump_choices` exported, to those of this process.

    Loaded choices are taken under `torch.use_deterministic_algorithms` and `torch.backends.cudnn.deterministic` too,
    where nothing is measured: what depends on a clock would differ from one run to the next.

    Args:
        text: an export from the same versions of freezekit, torch and cuDNN on the same kind of device: times measured
            with others say nothing here.

    Raises:
        ValueError: if the text is not such an export, or not from here; nothing is loaded then.
        TypeError: if it is not a string.

    >>> load_choices(dump_choices())
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    try:
        document = json.loads(text)
        there, rows = dict(document["measured_with"]), [Choice(**row) for row in document["choices"]]
        for row in rows:
            _check(row)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"text must be what dump_choices() gave, got {text[:60]!r}: {error!r}") from error
    here = _here()
    if differing := [name for name in here if there.get(name, "unknown") != here[name]]:
        facts = ", ".join(f"{name} {there.get(name, 'unknown')!r} (here {here[name]!r})" for name in differing)
        raise ValueError(f"text must hold choices measured here, got some measured with {facts}: measure them again")
    for row in rows:
        _C.choices.load(row.problem, row.aten_seconds, row.native_seconds, row.agree, row.note)


def clear_choices() -> None:
    """Forgets every choice: what comes next is held against torch's operators again.

    >>> clear_choices()
    """
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


def _check(row: Choice) -> None:
    seconds = (row.aten_seconds, row.native_seconds)
    if not isinstance(row.problem, str) or not isinstance(row.agree, bool) or not isinstance(row.note, str):
        raise TypeError(f"problem and note must be text, agree true or false, got {row!r}")
    (row.problem + row.note).encode()  # JSON has halves of characters, which no text has
    if not all(isinstance(s, (int, float)) and 0 <= float(s) < float("inf") for s in seconds):
        raise ValueError(f"seconds must be non-negative numbers, got {row!r}")
