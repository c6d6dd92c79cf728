"""Bugs in the kernels around the convolutions."""

from __future__ import annotations

from .plant import FILTER, NORM_AFFINE, OVERFLOW, RACE, REDUCE, bug

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
        "sums of slices are added before they are there",
        REDUCE,
        "sums[lane][output] = sum;\n      __syncthreads();",
        "sums[lane][output] = sum;",
        case="bias:4500,40",
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "slices behind the last whole eighth are left out",
        REDUCE,
        "(slices + kLanes - 1) / kLanes",
        "slices / kLanes",
        case="bias:4500,40",
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
]
