"""Bugs in the direct kernels, and in what they share with the others."""

from __future__ import annotations

from tests.kernels.emulated import Problem

from ..cases import RAGGED, SMALL, STRIDED, WIDE, Case
from .plant import DIRECT_GATHER, DIRECT_WGRAD, EPILOGUE, GATHER_MATHS, MASK, OVERFLOW, RACE, REDUCE, bug

FPROP = Case("fprop", SMALL, family="direct")
DGRAD = Case("dgrad", STRIDED, family="direct")
WGRAD = Case("wgrad", SMALL, family="direct")
SPLIT_WGRAD = Case("wgrad", SMALL, family="direct", split_k=3)
MASKS = ("relu", "mask_out")
ODD = Problem(n=1, c=8, h=5, w=5, k=8)  # whole runs of channels, but no whole number of mask words

PLANTS = [
    bug(
        "a gather reads past the last row",
        DIRECT_GATHER,
        "iw >= 0 && iw < g.in_w",
        "iw >= 0",
        case=FPROP,
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "an epilogue writes a row too many",
        DIRECT_GATHER,
        "if (m >= rows) continue;",
        "if (m > rows) continue;",
        case=FPROP,
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "a tile of shared memory is written past its end",
        DIRECT_GATHER,
        "tile[lane_l][lane_m + i * kLoadLanes] = value;",
        "(&tile[lane_l][0])[lane_m + i * kLoadLanes + 5] = value;",
        case=FPROP,
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "a tile of shared memory is read past its end",
        DIRECT_WGRAD,
        "acc[i][e] += a * x_tile[l][thread_column + e];",
        "acc[i][e] += a * (&x_tile[l][0])[thread_column + e + 5];",
        case=WGRAD,
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "a tile is read before it is whole",
        DIRECT_GATHER,
        "at.advance(kStep, g.in_c, w.taps);\n    __syncthreads();",
        "at.advance(kStep, g.in_c, w.taps);",
        case=FPROP,
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "a tile is overwritten while it is read",
        DIRECT_WGRAD,
        "__syncthreads();  // the next step overwrites the tiles",
        "",
        case=WGRAD,
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "a barrier for half of the block",
        DIRECT_GATHER,
        "__syncthreads();  // the next step overwrites the tiles",
        "if (tid < 64) __syncthreads();",
        case=FPROP,
        expect="launch failed.*threads of a block meet at different __syncthreads",
    ),
    bug(
        "mask words of two runs are or-ed without an atomic",
        EPILOGUE,
        "if (parts.first) atomicOr(word, parts.first);",
        "*word |= parts.first;",
        case=Case("fprop", RAGGED, family="direct", epilogue=MASKS),
        including=(DIRECT_GATHER,),
        mode="tsan",
        expect=RACE,
    ),
    bug(
        "the end of ReLU6 has a gradient",
        EPILOGUE,
        "cast<Acc>(values[i]) >= end",
        "cast<Acc>(values[i]) > end",
        case=Case("fprop", WIDE, family="direct", epilogue=(*MASKS, "relu6")),
        including=(DIRECT_GATHER,),
        expect="wrong mask",
    ),
    bug(
        "a run is scaled by the factors of the first channels",
        EPILOGUE,
        "scale_run(e.scale + channel, count",
        "scale_run(e.scale, count",
        case=Case("fprop", WIDE, "bf16", "direct", epilogue=("scale",)),
        including=(DIRECT_GATHER,),
    ),
    bug(
        "a run of ragged channels is scaled as a whole one",
        EPILOGUE,
        "scale_run(e.scale + channel, count, vector, acc)",
        "scale_run(e.scale + channel, 8, vector, acc)",
        case=Case("fprop", RAGGED, family="direct", epilogue=("scale",)),
        including=(DIRECT_GATHER,),
        mode="asan",
        expect=OVERFLOW,
    ),
    bug(
        "a wide bias is read as a narrow one",
        EPILOGUE,
        "(std::is_same_v<T, Acc> || e.wide_bias)",
        "std::is_same_v<T, Acc>",
        case=Case("fprop", WIDE, "bf16", "direct", epilogue=("bias", "wide_bias")),
        including=(DIRECT_GATHER,),
    ),
    bug(
        "a phase starts its taps at the wrong one",
        GATHER_MATHS,
        "gather.filter_first = first;",
        "gather.filter_first = 0;",
        case=DGRAD,
        including=(DIRECT_GATHER,),
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
        "a slice of wgrad runs into the next",
        DIRECT_WGRAD,
        "const int32_t slice_end = min(slice_begin + p.positions_per_slice, p.positions);",
        "const int32_t slice_end = p.positions;",
        case=SPLIT_WGRAD,
    ),
    bug(
        "the last slice of wgrad is left out",
        REDUCE,
        "s < last; ++s) sum",
        "s < last - 1; ++s) sum",
        case=SPLIT_WGRAD,
    ),
    bug(
        "the last rows of dw stay as they were",
        DIRECT_WGRAD,
        "if (m >= p.k) continue;",
        "if (m >= p.k - 1) continue;",
        case=Case("wgrad", WIDE, "bf16", "direct"),
    ),
]
