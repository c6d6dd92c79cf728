"""A CPU that stands for a GPU: the emulated kernels compete with torch's operators, as compiled ones do there."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

import freezekit as fk
from freezekit import _C, _extension

ROOT = Path(__file__).resolve().parents[2]

FASTER, SLOWER = 0.0, 1e9  # what the emulator's times are multiplied by: no test depends on a clock


@contextmanager
def stand_in(handicap: float = FASTER) -> Iterator[None]:
    """Within it, nothing is known at first, and `auto` decides as on a GPU."""
    fk.tuning.clear_choices()
    _C.choices.emulate(handicap)
    try:
        yield
    finally:
        _C.choices.emulate(None)
        fk.tuning.clear_choices()


@contextmanager
def launches() -> Iterator[list[str]]:
    """The kernels of freezekit's that ran within the block, once it has ended."""
    log: list[str] = []
    _C.set_launch_log(True)
    try:
        yield log
        log += [row["kernel"] for row in _C.take_launch_log()]
    finally:
        _C.set_launch_log(False)


def launched(call: Any) -> list[str]:
    """What a call launches."""
    with launches() as log:
        call()
    return log


def decided() -> dict[str, fk.tuning.Choice]:
    """The choices, by the first word of their problem."""
    return {choice.problem.split()[0]: choice for choice in fk.tuning.choices()}


def leaf(*size: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = torch.randn(*size).to(dtype)
    return (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()


class Faulty:
    """The emulated kernels, of which one can be told to fail."""

    def __init__(self, folder: Path) -> None:
        path = folder / "faulty.so"
        source = Path(__file__).with_name("faulty.cpp")
        real = f'-DREAL="{_extension.emulated_kernels()}"'
        # Torch's exceptions are what runs out of memory throws.
        with_torch = [f"-I{include}" for include in include_paths()]
        compiler = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", *with_torch, real, str(source)]
        subprocess.run([*compiler, "-o", str(path), "-ldl", f"-L{library_paths()[0]}", "-lc10"], check=True)
        self._library = ctypes.CDLL(str(path))
        _C.set_emulator_path(str(path))

    def fail(self, kernel: str, how: str) -> None:
        """From now on `kernel` ("activation", "gate", "conv2d", ...) fails as told, until `mend`."""
        assert self._library.set_fault(kernel.encode(), how.encode()) == 0, (kernel, how)

    def mend(self) -> None:
        self._library.set_fault(b"", b"")

    def capture(self, on: bool) -> None:
        """Whether a CUDA graph seems to be captured from now on."""
        self._library.set_capturing(int(on))

    def capture_modes(self) -> tuple[int, int, int]:
        """Activations that ran while waits of their thread would end captures elsewhere, and while not; the mode."""
        ran = [self._library.capture_mode(which) for which in range(4)]
        return ran[0] + ran[1], ran[2], ran[3]

    def wait(self, call: int) -> None:
        """A convolution takes half a second at this one of its calls from now on."""
        self._library.set_wait(call)

    def device(self, sm: int, sm_count: int) -> None:
        """What the kernels' device is from now on, for threads that ask anew."""
        self._library.set_device(sm, sm_count)
        _C.choices.emulate(FASTER)

    def close(self) -> None:
        _C.set_emulator_path(str(_extension.emulated_kernels()))
