"""Bugs in the offsets of groups: every kernel family reads or writes another group's channels."""

from __future__ import annotations

from ..cases import DEPTHWISE_MULTIPLIED, GEMM_GROUPED, GROUPED, Case, gemm
from .plant import DIRECT_GATHER, DIRECT_WGRAD, GEMM, OVERFLOW, WGRAD_GEMM, bug

WGRAD_MATHS = "csrc/core/wgrad.h"

PLANTS = [
    bug(
        "every group reads the first one's input",
        DIRECT_GATHER,
        "origin, at, in + group * g.in_c, lane_l",
        "origin, at, in, lane_l",
        case=Case("fprop", GROUPED, family="direct"),
    ),
    bug(
        "every group is stored where the first one is",
        DIRECT_GATHER,
        "channel = group * g.out_c + column;",
        "channel = column;",
        case=Case("dgrad", GROUPED, family="direct"),
    ),
    bug(
        "a group's dy is taken from the first one",
        DIRECT_WGRAD,
        "dy + l * p.k_all() + group * p.k + m",
        "dy + l * p.k_all() + m",
        case=Case("wgrad", GROUPED, family="direct"),
    ),
    bug(
        "groups of dw overlap",
        WGRAD_MATHS,
        "(static_cast<int64_t>(group) * k + m) * columns()",
        "static_cast<int64_t>(m) * columns()",
        case=Case("wgrad", GROUPED, family="direct"),
        including=(DIRECT_WGRAD,),
    ),
    bug(
        "tensor cores read the first group's input",
        GEMM,
        "in = in_all + static_cast<int64_t>(group) * g.in_c;",
        "in = in_all;",
        case=gemm("bf16", "fprop", GEMM_GROUPED),
    ),
    bug(
        "tensor cores read the first group's filter",
        GEMM,
        "(static_cast<int64_t>(group) * g.out_c + column0) * g.filter_row()",
        "static_cast<int64_t>(column0) * g.filter_row()",
        case=gemm("bf16", "dgrad", GEMM_GROUPED),
    ),
    bug(
        "tensor cores sum the first group's dy into every dw",
        WGRAD_GEMM,
        "dy = dy_all + static_cast<int64_t>(group) * p.k + row0",
        "dy = dy_all + row0",
        case=gemm("bf16", "wgrad", GEMM_GROUPED),
    ),
    bug(
        "a group's tile of x begins one group late",
        WGRAD_GEMM,
        "x = x_all + static_cast<int64_t>(group) * p.c;",
        "x = x_all + static_cast<int64_t>(group + 1) * p.c;",
        case=gemm("bf16", "wgrad", GEMM_GROUPED),
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "a filter is transposed across groups",
        "csrc/kernels/small/filter_transform.cu",
        "const int64_t k_all = static_cast<int64_t>(group) * size.k + k;",
        "const int64_t k_all = k;",
        case=gemm("bf16", "dgrad", GEMM_GROUPED),
    ),
    bug(
        "output channels of one input channel are counted from the wrong end",
        "csrc/kernels/depthwise/depthwise_generic.cu",
        "load_global(x + there * p.c_all() + k / p.k)",
        "load_global(x + there * p.c_all() + k % p.groups)",
        case=Case("wgrad", DEPTHWISE_MULTIPLIED, "f16"),
    ),
]
