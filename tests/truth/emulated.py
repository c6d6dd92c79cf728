"""freezekit's side: the Hopper kernels and single instructions in the emulator, as a library in this process."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from tests.emulator.build import MODES, Planted, Program, build

Array = np.ndarray[Any, Any]

HOPPER = "csrc/kernels/hopper"
PROGRAM = Program(
    "truth",
    (
        *("tests/truth/emulated.cu", "tests/emulator/probe_ptx.cu"),
        *(f"{HOPPER}/{name}.cu" for name in ("hopper_gemm_bf16", "hopper_gemm_f16", "hopper_gemm_tf32")),
        *(f"{HOPPER}/hopper_wgrad.cu", f"{HOPPER}/tensor_map.cu"),
        *("csrc/kernels/small/mask.cu", "csrc/kernels/target.cu"),
    ),
    shared=True,
)


@functools.cache
def library(planted: Planted) -> ctypes.CDLL:
    """The library, with a misreading where one is planted."""
    loaded = ctypes.CDLL(str(build(PROGRAM, MODES["plain"], planted)))
    loaded.truth_swizzled.restype = ctypes.c_uint32
    loaded.truth_descriptor.restype = ctypes.c_uint64
    loaded.freezekit_last_error.restype = ctypes.c_char_p
    return loaded


def call(planted: Planted, name: str, *arguments: object) -> str:
    """Calls a function that returns a Status; arrays go as pointers. Why the emulator refused, or nothing."""
    given = [a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments]
    status = getattr(library(planted), name)(*given)
    return library(planted).freezekit_last_error().decode() or f"status {status}" if status else ""
