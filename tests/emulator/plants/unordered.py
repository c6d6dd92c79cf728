"""Bugs that integers cannot show: slices of a wgrad added in the order of the schedule, by atomics into one sum.

It takes three slices that are not empty: two have the same sum in either order.
"""

from __future__ import annotations

from ..build import Patch, Planted
from ..cases import DEPTHWISE_3, GEMM_LONG, SMALL, Case, gemm
from .plant import DIRECT_WGRAD, WGRAD_GEMM, Plant

GEMM_LAUNCH = "csrc/kernels/gemm_sm80/wgrad_gemm.cu"
DEPTHWISE_WGRAD = "csrc/kernels/depthwise/depthwise_wgrad.cu"
ONE_SLICE = Patch(
    "csrc/kernels/conv2d.cu", "p.filter_numel(), split_k, dtype, stream);", "p.filter_numel(), 1, dtype, stream);"
)


def plant(case: Case, *patches: Patch) -> Plant:
    return Plant("slices are added in the order of the schedule", Planted(patches), case, "plain", "")


UNORDERED_SPLIT_K = {
    "direct": plant(
        Case("wgrad", SMALL, family="direct", split_k=3),
        Patch(
            DIRECT_WGRAD,
            "store_global(partial + blockIdx.y * p.dw_numel() + offset + e, acc[i][e]);",
            "atomicAdd(partial + offset + e, acc[i][e]);",
        ),
        Patch(
            DIRECT_WGRAD,
            "      return FK_LAUNCH(conv2d_direct_wgrad_kernel",
            "      if (partial) memset(partial, 0, p.filter_numel() * sizeof(*partial));\n"
            "      return FK_LAUNCH(conv2d_direct_wgrad_kernel",
        ),
        ONE_SLICE,
    ),
    "implicit_gemm": plant(
        gemm("f32", "wgrad", GEMM_LONG, split_k=3),
        Patch(WGRAD_GEMM, "partial + blockIdx.y * p.dw_numel(), acc", "partial, acc"),
        Patch(
            WGRAD_GEMM,
            "store_global(reinterpret_cast<Pair*>(row + j), Pair{cast<Out>(first), cast<Out>(second)});",
            "if constexpr (std::is_same_v<Out, float>) atomicAdd(row + j, first), atomicAdd(row + j + 1, second);",
        ),
        Patch(
            GEMM_LAUNCH,
            "  return dispatch_short_dtype(",
            "  memset(launch.workspace, 0, launch.problem.filter_numel() * 4);\n  return dispatch_short_dtype(",
        ),
        ONE_SLICE,
    ),
    "depthwise": plant(
        Case("wgrad", DEPTHWISE_3, "f32", "depthwise", 1, split_k=4),  # as many slices as tiles
        Patch(
            DEPTHWISE_WGRAD,
            "store_global(out + static_cast<int64_t>(channel0 + c) * (kSize * kSize) + r * kSize + s, sum);",
            "atomicAdd(partial + static_cast<int64_t>(channel0 + c) * (kSize * kSize) + r * kSize + s, sum);",
        ),
        Patch(
            DEPTHWISE_WGRAD,
            "  return dispatch_short_dtype(",
            "  memset(launch.workspace, 0, p.filter_numel() * 4);\n  return dispatch_short_dtype(",
        ),
        ONE_SLICE,
    ),
}
