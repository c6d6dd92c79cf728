"""Bugs in the kernels around the convolutions."""

from __future__ import annotations

from .plant import FILTER, MASK, NORM_AFFINE, OVERFLOW, RACE, REDUCE, bug

PLANTS = [
    bug(
        "sums of lanes are added before they are there",
        REDUCE,
        "sums[threadIdx.y][threadIdx.x] = sum;\n  __syncthreads();",
        "sums[threadIdx.y][threadIdx.x] = sum;",
        case="bias:300,40",
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "a transposed tile is read before it is whole",
        "csrc/kernels/small/layout.cu",
        "    }\n    __syncthreads();\n    for (int i = y; i < kTile; i += kRowLanes) {",
        "    }\n    for (int i = y; i < kTile; i += kRowLanes) {",
        case="layout:2,33,5,7",
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "a filter is scaled by the wrong channel's factor",
        FILTER,
        "load_global(scale + k_all)",
        "load_global(scale + c)",
        case="filter:40,33,2",
    ),
    bug(
        "a norm's shift lacks its mean",
        NORM_AFFINE,
        "load_double(norm.bias, k, 0) - load_double(norm.mean, k, 0)",
        "load_double(norm.bias, k, 0)",
        case="norm:300",
    ),
    bug(
        "a norm's channels behind the last are written",
        NORM_AFFINE,
        "if (k >= channels) return;",
        "if (k > channels) return;",
        case="norm:300",
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "a mask is packed from beyond the tensor",
        MASK,
        "i < numel && !(cast",
        "!(cast",
        case="mask:31",
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "lanes that hold a mask's last elements miss the ballot",
        MASK,
        "const uint32_t word = __ballot_sync(0xffffffffu, keep);",
        "if (i >= numel) { __syncwarp(); continue; }\n    const uint32_t word = __ballot_sync(0xffffffffu, keep);",
        case="mask:1000",
        expect="launch failed.*lanes of a warp meet at different collectives: .*__ballot_sync",
    ),
]
