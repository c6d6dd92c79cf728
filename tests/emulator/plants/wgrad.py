"""Bugs in the tensor-core wgrad."""

from __future__ import annotations

from ..cases import CHUNKS, GEMM_STRIDED, RAGGED, UNEVEN, gemm
from .plant import RACE, RING, WGRAD_GEMM, bug

WGRAD = gemm("bf16", "wgrad", CHUNKS)
SPLIT = gemm("bf16", "wgrad", GEMM_STRIDED, split_k=2)

PLANTS = [
    bug(
        "rows of an operand are not padded",
        WGRAD_GEMM,
        "kPitch = (kWidth + kPadding) *",
        "kPitch = kWidth *",
        case=WGRAD,
        expect="bank conflicts in [0-9]+ phases",
    ),
    bug(
        "the quarters of a transposed fragment are exchanged",
        WGRAD_GEMM,
        "l + lane / 16 * 8 + lane % 8, m + lane / 8 % 2 * 8",
        "l + lane / 8 % 2 * 8 + lane % 8, m + lane / 16 * 8",
        case=WGRAD,
    ),
    bug(
        "dy of the next slice is summed too",
        WGRAD_GEMM,
        "end = min(l + p.positions_per_slice, p.positions);",
        "end = p.positions;",
        case=SPLIT,
    ),
    bug(
        "k-tiles are refilled while warps read them",
        RING,
        "__syncthreads();  // the k-tile is there for all, and nobody reads the stage that is refilled next",
        "",
        case=WGRAD,
        including=("csrc/kernels/gemm_sm80/wgrad_gemm.cu",),
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "rows of odd length are stored in pairs",
        WGRAD_GEMM,
        "const bool pairs = columns % 2 == 0 &&",
        "const bool pairs = columns > 0 &&",
        case=gemm("bf16", "wgrad", UNEVEN),
        expect="launch failed.*4 bytes accessed at an address that is not a multiple of it",
    ),
    bug(
        "channels beyond the last are loaded",
        WGRAD_GEMM,
        "row_inside && e < dy_columns",
        "row_inside",
        case=gemm("bf16", "wgrad", RAGGED),
        mode="asan",
        expect="AddressSanitizer: heap-buffer-overflow",
    ),
]
