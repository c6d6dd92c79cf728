"""Bugs to plant in the kernels, each with the case that meets it and the one mode that must catch it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.kernels.emulated import Problem

from .build import Patch, Planted
from .cases import (
    CHUNKS,
    GEMM_DILATED,
    GEMM_GAPPED,
    GEMM_STRIDED,
    POINTWISE,
    RAGGED,
    SMALL,
    STRIDED,
    WIDE,
    Case,
    gemm,
)

GATHER = "csrc/kernels/direct_gather.cu"
WGRAD = "csrc/kernels/direct_wgrad.cu"
GEMM_HEADER = "csrc/kernels/implicit_gemm.h"
GEMM_LAUNCH = "csrc/kernels/implicit_gemm_launch.h"
BF16 = ("csrc/kernels/implicit_gemm_bf16.cu",)
REDUCE = "csrc/kernels/reduce.cu"
MASK = "csrc/kernels/mask.cu"
EPILOGUE = "csrc/kernels/epilogue.h"
GATHER_MATHS = "csrc/core/gather.h"

WRONG = "wrong value"
RACE = "ThreadSanitizer: data race"
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"


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
    if not including and path in (GEMM_HEADER, GEMM_LAUNCH):
        including = BF16
    return Plant(name, Planted((Patch(path, old, new),), including), case, mode, expect, seed, cp_async)


DIRECT_FPROP = Case("fprop", SMALL, family="direct")
DIRECT_DGRAD = Case("dgrad", STRIDED, family="direct")
DIRECT_WGRAD = Case("wgrad", SMALL, family="direct")
SPLIT_WGRAD = Case("wgrad", SMALL, family="direct", split_k=3)
GEMM_FPROP = gemm("bf16", "fprop", CHUNKS)
MASKS = ("relu", "mask_out")
ODD = Problem(n=1, c=8, h=5, w=5, k=8)  # whole runs of channels, but no whole number of mask words

PLANTS = [
    # Bounds.
    bug(
        "a gather reads past the last row",
        GATHER,
        "iw >= 0 && iw < g.in_w",
        "iw >= 0",
        case=DIRECT_FPROP,
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "an epilogue writes a row too many",
        GATHER,
        "if (m >= rows) continue;",
        "if (m > rows) continue;",
        case=DIRECT_FPROP,
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "a tile of shared memory is written past its end",
        GATHER,
        "in_tile[lane_l][lane_m + i * kLoadLanes] = value;",
        "(&in_tile[lane_l][0])[lane_m + i * kLoadLanes + 5] = value;",
        case=DIRECT_FPROP,
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "a tile of shared memory is read past its end",
        WGRAD,
        "acc[i][e] += a * x_tile[l][thread_column + e];",
        "acc[i][e] += a * (&x_tile[l][0])[thread_column + e + 5];",
        case=DIRECT_WGRAD,
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "filter rows beyond the last channel are read",
        GEMM_HEADER,
        "element.tap_h < h.taps && j < filter_rows;",
        "element.tap_h < h.taps;",
        case=gemm("bf16", "fprop", RAGGED, 4),
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "a position overflows where no tap meets the input",
        GEMM_HEADER,
        "*position = inside ? origin[i].image + ih * g.in_w + iw : 0;",
        "*position = origin[i].image + ih * g.in_w + iw;",
        case=GEMM_FPROP,
        mode="asan",
        expect="runtime error: signed integer overflow",
    ),
    bug(
        "the ring gets less shared memory than it uses",
        GEMM_LAUNCH,
        "Tile::kSharedBytes, stream",
        "Tile::kSharedBytes - 16, stream",
        case=GEMM_FPROP,
        expect="launch failed.*cp.async of 16 bytes does not write inside shared memory",
    ),
    # Alignment.
    bug(
        "ragged channels take the 16-byte path",
        GEMM_LAUNCH,
        "g.in_c % (kChunkBytes / sizeof(T)) == 0 &&",
        "g.in_c > 0 &&",
        case=gemm("bf16", "fprop", RAGGED),
        expect="launch failed.*cp.async of 16 bytes: an address is not a multiple of 16",
    ),
    bug(
        "ragged outputs are stored 16 bytes at a time",
        EPILOGUE,
        "parameters.vector = out_c % 8 == 0 &&",
        "parameters.vector = out_c > 0 &&",
        case=gemm("bf16", "fprop", RAGGED, 4),
        including=BF16,
        expect="launch failed.*16 bytes accessed at an address that is not a multiple of it",
    ),
    # Barriers and races.
    bug(
        "a tile is read before it is whole",
        GATHER,
        "at.advance(kStep, g.in_c, w.taps);\n    __syncthreads();",
        "at.advance(kStep, g.in_c, w.taps);",
        case=DIRECT_FPROP,
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "a tile is overwritten while it is read",
        WGRAD,
        "__syncthreads();  // the next step overwrites the tiles",
        "",
        case=DIRECT_WGRAD,
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "a barrier for half of the block",
        GATHER,
        "__syncthreads();  // the next step overwrites the tiles",
        "if (tid < 64) __syncthreads();",
        case=DIRECT_FPROP,
        expect="launch failed.*threads of a block meet at different __syncthreads",
    ),
    bug(
        "a stage of the ring is read before all copies are seen",
        GEMM_HEADER,
        "__syncthreads();  // the k-tile is there for all, and nobody reads the stage that is refilled next",
        "",
        case=GEMM_FPROP,
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "patches overwrite the ring under other warps",
        GEMM_HEADER,
        "__syncthreads();  // the ring becomes the warps' patches",
        "",
        case=gemm("bf16", "fprop", POINTWISE),
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "a patch is overwritten while lanes read it",
        GEMM_HEADER,
        "__syncwarp();  // the next fragment overwrites the patch",
        "",
        case=GEMM_FPROP,
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "a filter is transposed before it is loaded",
        "csrc/kernels/filter_transform.cu",
        "  }\n  __syncthreads();\n",
        "  }\n",
        case=gemm("bf16", "dgrad", CHUNKS),
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "mask words of two runs are or-ed without an atomic",
        EPILOGUE,
        "if (parts.first) atomicOr(word, parts.first);",
        "*word |= parts.first;",
        case=Case("fprop", RAGGED, family="direct", epilogue=MASKS),
        including=(GATHER,),
        mode="tsan",
        expect=RACE,
    ),
    # Pipeline.
    bug(
        "the wait leaves one group too many in flight",
        GEMM_HEADER,
        "ptx::cp_async_wait<Tile::kStages - 2>();",
        "ptx::cp_async_wait<Tile::kStages - 1>();",
        case=GEMM_FPROP,
    ),
    bug(
        "the stage that is read is refilled",
        GEMM_HEADER,
        "const int32_t refill = stage == 0 ? Tile::kStages - 1 : stage - 1;",
        "const int32_t refill = stage;",
        case=GEMM_FPROP,
        cp_async="eager",
    ),
    bug(
        "an empty group is not committed",
        GEMM_HEADER,
        "ptx::cp_async_commit();  // empty groups too: the wait below counts groups",
        "if (i < tiles) ptx::cp_async_commit();",
        case=gemm("bf16", "fprop", POINTWISE),
    ),
    bug(
        "padding is copied instead of zeroed",
        GEMM_HEADER,
        "from, inside);",
        "from, true);",
        case=GEMM_FPROP,
    ),
    # Fragments and banks.
    bug(
        "fragments of B are taken from the wrong registers",
        GEMM_HEADER,
        "{b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]}",
        "{b[j / 2][j % 2], b[j / 2][j % 2 + 2]}",
        case=GEMM_FPROP,
    ),
    bug(
        "rows of an accumulator are exchanged",
        GEMM_HEADER,
        "make_float2(acc[i][j][2], acc[i][j][3])",
        "make_float2(acc[i][j][0], acc[i][j][1])",
        case=GEMM_FPROP,
    ),
    bug(
        "chunks are not swizzled",
        GEMM_HEADER,
        "((chunk ^ (row >> 1 & 3)) * kChunkBytes)",
        "(chunk * kChunkBytes)",
        case=GEMM_FPROP,
        expect="bank conflicts in [0-9]+ phases",
    ),
    bug(
        "a lane misses an ldmatrix",
        GEMM_HEADER,
        "      ptx::ldmatrix(a, stage",
        "      if (lane != 5) ptx::ldmatrix(a, stage",
        case=GEMM_FPROP,
        expect="launch failed.*meet at different collectives: (ldmatrix|mma.*) and (ldmatrix|mma.*)",
    ),
    # Tails, phases, masks, splits.
    bug(
        "the tail of the reduction is dropped",
        GEMM_HEADER,
        "(h.taps * w.taps * g.in_c + kTileValues - 1) / kTileValues",
        "h.taps * w.taps * g.in_c / kTileValues",
        case=GEMM_FPROP,
    ),
    bug(
        "a phase starts its taps at the wrong one",
        GATHER_MATHS,
        "gather.filter_first = first;",
        "gather.filter_first = 0;",
        case=DIRECT_DGRAD,
        including=(GATHER,),
    ),
    bug(
        "phases with a row more are decoded as the others",
        GATHER_MATHS,
        "g.wider_h = g.h.x % g.h.stride,",
        "g.wider_h = 0,",
        case=gemm("bf16", "dgrad", GEMM_STRIDED),
        including=("csrc/kernels/conv2d.cu", "csrc/kernels/implicit_gemm.cu"),
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "a phase without taps writes nothing",
        GEMM_HEADER,
        "if (row0 >= rows) return;",
        "if (row0 >= rows || h.taps * w.taps == 0) return;",
        case=gemm("bf16", "dgrad", GEMM_GAPPED),
    ),
    bug(
        "dilated taps of dgrad walk the wrong way",
        GATHER_MATHS,
        "gather.in_step = -(axis.dilation / divisor);",
        "gather.in_step = axis.dilation / divisor;",
        case=gemm("bf16", "dgrad", GEMM_DILATED),
        including=BF16,
    ),
    bug(
        "mask words keep what was in them",
        MASK,
        "words - (numel % 32 != 0) : 0;",
        "words - (numel % 32 != 0) : words;",
        case=Case("fprop", RAGGED, family="direct", epilogue=MASKS),
        expect="wrong mask",
    ),
    bug(
        "the bits past the end of a mask are stale",
        MASK,
        "words - (numel % 32 != 0) : 0;",
        "words : 0;",
        case=Case("fprop", ODD, "f16", "direct", epilogue=MASKS),
        expect="wrong mask",
    ),
    bug(
        "bits of a mask are in the wrong order",
        EPILOGUE,
        "!(cast<Acc>(run[i]) <= 0)) << i;",
        "!(cast<Acc>(run[i]) <= 0)) << (7 - i);",
        case=gemm("bf16", "fprop", CHUNKS, epilogue=MASKS),
        including=BF16,
        expect="wrong value|wrong mask",
    ),
    bug(
        "a slice of wgrad runs into the next",
        WGRAD,
        "const int32_t slice_end = min(slice_begin + p.positions_per_slice, p.positions);",
        "const int32_t slice_end = p.positions;",
        case=SPLIT_WGRAD,
    ),
    bug(
        "the last slice of wgrad is left out",
        REDUCE,
        "s < slices; ++s) sum",
        "s < slices - 1; ++s) sum",
        case=SPLIT_WGRAD,
    ),
    bug(
        "the last rows of dw stay as they were",
        WGRAD,
        "if (m >= p.k) continue;",
        "if (m >= p.k - 1) continue;",
        case=Case("wgrad", WIDE, "bf16", "direct"),
    ),
    # Small kernels.
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
        "csrc/kernels/layout.cu",
        "    }\n    __syncthreads();\n    for (int i = y; i < kTile; i += kRowLanes) {",
        "    }\n    for (int i = y; i < kTile; i += kRowLanes) {",
        case="layout:2,33,5,7",
        mode="tsan",
        expect=RACE,
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

UNORDERED_SPLIT_K = Plant(
    "slices are added in the order of the schedule",
    Planted(
        (
            Patch(
                WGRAD,
                "store_global(partial + blockIdx.y * p.dw_numel() + offset + e, acc[i][e]);",
                "atomicAdd(partial + offset + e, acc[i][e]);",
            ),
            Patch(
                WGRAD,
                "    const Status status = FK_LAUNCH(kernel, grid, kThreads,",
                "    if (partial) memset(partial, 0, p.filter_numel() * sizeof(*partial));\n"
                "    const Status status = FK_LAUNCH(kernel, grid, kThreads,",
            ),
            Patch(WGRAD, "p.filter_numel(), split_k, dtype, stream);", "p.filter_numel(), 1, dtype, stream);"),
        )
    ),
    SPLIT_WGRAD,
    "plain",
    "",
)
