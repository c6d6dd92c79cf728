"""Bugs in the kernels of the layers around convolutions."""

from __future__ import annotations

from .plant import OVERFLOW, bug

GATE = "csrc/kernels/small/gate.cu"
MAX_POOL = "csrc/kernels/small/max_pool.cu"
POOL = "pool:2,3,7,9,3,2,1,1"

PLANTS = [
    bug(
        "a gradient passes relu at zero",
        GATE,
        "return !(x <= A(0)); }",
        "return !(x < A(0)); }",
        case="activation:100",
        expect="wrong mask: activation",
    ),
    bug(
        "a run of eight reaches beyond the tensor",
        GATE,
        "return left >= kRun ? kRun : left > 0 ? static_cast<int>(left) : 0;",
        "return left > 0 ? kRun : 0;",
        case="activation:31",
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "bits behind the last element stay as they were",
        GATE,
        "int64_t runs_of_mask(int64_t numel) { return mask_words(numel) * 4; }",
        "int64_t runs_of_mask(int64_t numel) { return ceil_div(numel, kRun); }",
        case="activation:33",
        expect="wrong mask: activation",
    ),
    bug(
        "a gate reads a byte's bits from the other end",
        GATE,
        "byte >> i & 1u;",
        "byte >> (kRun - 1 - i) & 1u;",
        case="activation:64",
    ),
    bug(
        "the last of equal values is pooled",
        MAX_POOL,
        "if (value > best || value != value) {",
        "if (value >= best || value != value) {",
        case=POOL,
        expect="wrong value: tap",
    ),
    bug(
        "a place between two taps counts as at the first",
        MAX_POOL,
        "if (rest == 0) f(output, tap);",
        "f(output, tap);",
        case="pool:1,2,9,8,3,1,2,2",
        expect="wrong value: scatter",
    ),
    bug(
        "a place asks outputs beyond the last",
        MAX_POOL,
        "from >= 0 && output < outputs; from",
        "from >= 0; from",
        case="pool:1,1,6,6,3,2,0,1",
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "a tap from elsewhere leads out of the input",
        MAX_POOL,
        "is_one && row >= 0 && row < g.in.h && column >= 0 && column < g.in.w;",
        "is_one;",
        case=POOL,
        mode="asan",
        expect=OVERFLOW,
    ),
]
