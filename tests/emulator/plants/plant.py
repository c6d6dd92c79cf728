"""What a planted bug is."""

from __future__ import annotations

from dataclasses import dataclass

from ..build import Patch, Planted
from ..cases import Case

WRONG = "wrong value"
RACE = "ThreadSanitizer: data race"
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"

DIRECT_GATHER = "csrc/kernels/direct/direct_gather.cu"
DIRECT_WGRAD = "csrc/kernels/direct/direct_wgrad.cu"
GEMM = "csrc/kernels/gemm_sm80/implicit_gemm.h"
FINISH = "csrc/kernels/gemm_sm80/finish_fragment.h"
GEMM_LAUNCH = "csrc/kernels/gemm_sm80/implicit_gemm_launch.h"
GEMM_BF16 = "csrc/kernels/gemm_sm80/implicit_gemm_bf16.cu"
WGRAD_GEMM = "csrc/kernels/gemm_sm80/wgrad_gemm.h"
RING = "csrc/kernels/gemm_sm80/ring.h"
TENSOR_CORE = "csrc/kernels/gemm_sm80/tensor_core.h"
DEPTHWISE = "csrc/kernels/depthwise/depthwise.h"
REDUCE = "csrc/kernels/small/reduce.cu"
MASK = "csrc/kernels/small/mask.cu"
FILTER = "csrc/kernels/small/filter_transform.cu"
NORM_AFFINE = "csrc/kernels/small/norm_affine.cu"
EPILOGUE = "csrc/kernels/epilogue.h"
GATHER_MATHS = "csrc/core/gather.h"
HOPPER = "csrc/kernels/hopper/hopper_gemm.h"
HOPPER_RING = "csrc/kernels/hopper/hopper_ring.h"
HOPPER_WGRAD = "csrc/kernels/hopper/hopper_wgrad.h"
HOPPER_LAUNCH = "csrc/kernels/hopper/hopper_gemm_launch.h"
HOPPER_BF16 = "csrc/kernels/hopper/hopper_gemm_bf16.cu"
PIXEL_BOX = "csrc/core/pixel_box.h"
SHARED_TILE = "csrc/core/shared_tile.h"
# The sources to compile again with a header that is patched, where a plant does not say.
INCLUDING = {
    **dict.fromkeys((GEMM, GEMM_LAUNCH, FINISH, RING, TENSOR_CORE), GEMM_BF16),
    **dict.fromkeys((HOPPER, HOPPER_RING, HOPPER_LAUNCH, PIXEL_BOX, SHARED_TILE), HOPPER_BF16),
    WGRAD_GEMM: "csrc/kernels/gemm_sm80/wgrad_gemm.cu",
    HOPPER_WGRAD: "csrc/kernels/hopper/hopper_wgrad.cu",
}


@dataclass(frozen=True)
class Plant:
    """`case` is a convolution or a job of small_driver.cpp; `expect` a regular expression of the output."""

    name: str
    planted: Planted
    case: Case | str
    mode: str
    expect: str
    seed: int = 0
    cp_async: str = "lazy"


def bug(
    name: str,
    path: str,
    old: str,
    new: str,
    *,
    case: Case | str,
    mode: str = "plain",
    expect: str = WRONG,
    including: tuple[str, ...] = (),
    seed: int = 0,
    cp_async: str = "lazy",
) -> Plant:
    if not including and path in INCLUDING:
        including = (INCLUDING[path],)
    return Plant(name, Planted((Patch(path, old, new),), including), case, mode, expect, seed, cp_async)
