"""The probe kernels as a library in this process."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .build import MODES, Program, build

SOURCES = (
    *(f"tests/emulator/probe_{name}" for name in ("ptx.cu", "launch.cu", "numbers.cpp")),
    *("tests/conformance/probe_sm90.cu", "csrc/kernels/hopper/tensor_map.cu"),
)
PROBE = Program("probe", SOURCES, shared=True)
LAUNCH_FAILED = 3


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build(PROBE, MODES["plain"])))
    loaded.freezekit_last_error.restype = ctypes.c_char_p
    loaded.freezekit_emulator_counter_name.restype = ctypes.c_char_p
    loaded.freezekit_emulator_counter.restype = ctypes.c_uint64
    loaded.freezekit_emulator_set_cp_async.restype = ctypes.c_bool
    return loaded


def pointer(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def launch(name: str, *arguments: object) -> None:
    """Calls probe_<name>; arrays go as pointers."""
    given = [pointer(a) if isinstance(a, np.ndarray) else a for a in arguments]
    status = getattr(library(), f"probe_{name}")(*given)
    if status:
        raise RuntimeError(f"status {status}: {last_error()}")


def last_error() -> str:
    return library().freezekit_last_error().decode()


def counters() -> dict[str, int]:
    names: list[bytes] = []
    while (name := library().freezekit_emulator_counter_name(len(names))) is not None:
        names.append(name)
    return {name.decode(): library().freezekit_emulator_counter(name) for name in names}


@contextmanager
def settings(seed: int = 0, cp_async: str = "lazy") -> Iterator[None]:
    """The schedule and the landing of copies, and counters from zero."""
    lib = library()
    lib.freezekit_emulator_set_seed(seed)
    assert lib.freezekit_emulator_set_cp_async(cp_async.encode())
    lib.freezekit_emulator_reset_counters()
    try:
        yield
    finally:
        lib.freezekit_emulator_set_seed(0)
        lib.freezekit_emulator_set_cp_async(b"lazy")
