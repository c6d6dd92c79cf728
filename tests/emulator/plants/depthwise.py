"""Bugs in the depthwise kernels."""

from __future__ import annotations

from ..cases import DEPTHWISE_3, DEPTHWISE_5, DEPTHWISE_7, Case
from .plant import DEPTHWISE, RACE, bug

GATHER = "csrc/kernels/depthwise/depthwise_gather.cu"
WGRAD = "csrc/kernels/depthwise/depthwise_wgrad.cu"
GENERIC = "csrc/kernels/depthwise/depthwise_generic.cu"

PLANTS = [
    bug(
        "the halo is taken from the wrong rows",
        DEPTHWISE,
        "ih >= 0 && ih < height && iw",
        "ih >= 0 && ih < height - 1 && iw",
        case=Case("fprop", DEPTHWISE_3, "bf16"),
        including=(GATHER,),
    ),
    bug(
        "the patch is used before it has landed",
        GATHER,
        """channels, rotated);
  ptx::cp_async_wait<0>();""",
        "channels, rotated);",
        case=Case("fprop", DEPTHWISE_7, "bf16"),
        expect="wrong value|a thread ends with a cp.async",
    ),
    bug(
        "taps of the other parity are added",
        GATHER,
        "int32_t r = at.row & 1; r < kSize; r += 2",
        "int32_t r = 0; r < kSize; r += 2",
        case=Case("dgrad", DEPTHWISE_5, "bf16"),
    ),
    bug(
        "a patch is overwritten while it is summed",
        WGRAD,
        "__syncthreads();  // the next tile, or the sums below, overwrite the patches",
        "",
        case=Case("wgrad", DEPTHWISE_3, "bf16"),
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "sums of a filter row are overwritten while they are added",
        WGRAD,
        "__syncthreads();  // the next row overwrites the sums",
        "",
        case=Case("wgrad", DEPTHWISE_3, "bf16"),
        mode="tsan",
        expect=RACE,
    ),
]
