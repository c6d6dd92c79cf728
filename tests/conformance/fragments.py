"""Which lane holds which element of a fragment, by the PTX ISA's own formulas (sections 9.7.14.5.7, .8 and .15)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

LANES = range(32)
KINDS = {"bf16": 0, "f16": 1, "tf32": 2}  # as probe_ptx.cu counts them


def depth(kind: str) -> int:
    """K of the instruction."""
    return 8 if kind == "tf32" else 16


def element_a(kind: str, lane: int, i: int) -> tuple[int, int]:
    """(row, column) of A that element a_i of a lane's fragment holds."""
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return group + (0 if i in (0, 2) else 8), thread + (0 if i in (0, 1) else 4)
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (0 if i < 4 else 8)


def element_b(kind: str, lane: int, i: int) -> tuple[int, int]:
    """(row, column) of B that element b_i holds."""
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return thread + 4 * i, group
    return thread * 2 + (i & 1) + (0 if i < 2 else 8), group


def element_c(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of C and D that element c_i holds."""
    return (lane >> 2) + (0 if i < 2 else 8), (lane % 4) * 2 + (i & 1)


def rounded(kind: str, values: Array) -> Array:
    """Values as the operands of an instruction hold them, in float32; tf32 loses its low 13 bits."""
    single = np.ascontiguousarray(values, np.float32)
    if kind == "tf32":
        return (single.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.from_numpy(single).to(dtype).float().numpy()


def registers(kind: str, values: Array) -> Array:
    """32 x elements of a fragment, as 32 x registers of 32 bits, lower element first."""
    if kind == "tf32":
        return np.ascontiguousarray(values, np.float32).view(np.uint32)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    bits = torch.from_numpy(values.astype(np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)
    return np.ascontiguousarray(bits).view(np.uint32)


def fragments(kind: str, a: Array, b: Array, c: Array) -> tuple[Array, Array, Array]:
    """Registers of A (16 x K), B (K x 8) and C (16 x 8), a row per lane."""
    per_lane = {"a": 4 if kind == "tf32" else 8, "b": 2 if kind == "tf32" else 4}
    of_a = np.array([[a[element_a(kind, lane, i)] for i in range(per_lane["a"])] for lane in LANES])
    of_b = np.array([[b[element_b(kind, lane, i)] for i in range(per_lane["b"])] for lane in LANES])
    return registers(kind, of_a), registers(kind, of_b), fragment_c(c)


def fragment_c(c: Array) -> Array:
    """The fragment of C, 32 x 4."""
    return np.array([[c[element_c(lane, i)] for i in range(4)] for lane in LANES], np.float32)


def matrix_c(fragment: Array) -> Array:
    """The 16 x 8 matrix that a fragment of C or D holds."""
    matrix = np.empty((16, 8), np.float32)
    for lane in LANES:
        for i in range(4):
            matrix[element_c(lane, i)] = fragment[lane, i]
    return matrix
