"""Bugs that a right call of the class does not meet: in what a class of problems leaves open.

Each stands for a branch or a loop that depends on the problem: the second image, tile or group, what is left over, a
sum of more or fewer steps than the call's. `case` is a call that gives the right result all the same.
"""

from __future__ import annotations

from dataclasses import replace

from tests.kernels.emulated import Problem

from ..cases import Case, gemm, hopper
from .plant import (
    DIRECT_GATHER,
    DIRECT_WGRAD,
    FILTER,
    FINISH,
    GATHER_MATHS,
    GEMM,
    GEMM_BF16,
    HOPPER,
    HOPPER_WGRAD,
    REDUCE,
    RING,
    WGRAD_GEMM,
    Plant,
    bug,
)

WGRAD_MATHS = "csrc/core/wgrad.h"
GATHER = "csrc/kernels/depthwise/depthwise_gather.cu"
TILED_WGRAD = "csrc/kernels/depthwise/depthwise_wgrad.cu"
GENERIC = "csrc/kernels/depthwise/depthwise_generic.cu"
GEMM_WGRAD_CU = "csrc/kernels/gemm_sm80/wgrad_gemm.cu"
HOPPER_WGRAD_CU = "csrc/kernels/hopper/hopper_wgrad.cu"

ONE = Problem(n=1, c=16, h=5, w=5, k=16)  # one image, one tile, short sums
POINT = replace(ONE, r=1, s=1, pad=(0, 0))
PAIR = replace(ONE, c=32, k=32, groups=2)
ODD, EVEN = (replace(ONE, h=size, w=size, stride=(2, 2)) for size in (9, 8))
LONG = replace(ONE, c=160, k=16)
DEEP = replace(ONE, c=16, k=160)  # of dgrad
FEW = replace(ONE, h=4, w=4)  # positions

DW = Problem(n=1, c=16, h=5, w=5, k=16, groups=16)
DW_STRIDED = replace(DW, stride=(2, 2))
DW_ONE = replace(DW, dilation=(2, 2))  # generic, a filter for each channel
DW_MANY = replace(DW, c=8, k=16, groups=8)


def direct(op: str, problem: Problem, split_k: int = 1, config: int = 1) -> Case:
    return Case(op, problem, "f32", "direct", config, split_k)


IMAGE = "return {n * in_h * in_w, axis_h", "return {0 * n, axis_h"
WGRAD_IMAGE = "return {n * h.x * w.x, p", "return {0 * n, p"
ROWS, TWO_ROWS = "/ column_tiles / g.groups * kRows;", "/ column_tiles / g.groups * (kRows + 1);"
GEMM_ROWS, GEMM_TWO_ROWS = "/ column_tiles / g.groups * Tile::kRows;", "/ column_tiles / g.groups * (Tile::kRows + 1);"
WIDER_H, WIDER_W = "g.wider_h = g.h.x % g.h.stride,", "g.wider_w = g.w.x % g.w.stride;"

HIDDEN: list[Plant] = [
    bug("direct: images", GATHER_MATHS, *IMAGE, case=direct("fprop", ONE), including=(DIRECT_GATHER,)),
    bug("direct: second tile of rows", DIRECT_GATHER, ROWS, TWO_ROWS, case=direct("dgrad", ONE)),
    bug(
        "direct: second tile of columns",
        DIRECT_GATHER,
        "column0 = block % column_tiles * kColumns;",
        "column0 = block % column_tiles * (kColumns + 8);",
        case=direct("fprop", ONE, config=0),
    ),
    bug(
        "direct: third group",
        DIRECT_GATHER,
        "at, in + group * g.in_c, lane_l",
        "at, in + min(group, 1) * g.in_c, lane_l",
        case=direct("fprop", PAIR),
    ),
    bug(
        "direct: long sums",
        DIRECT_GATHER,
        "l0 < h.taps * w.taps * g.in_c;",
        "l0 < min(h.taps * w.taps * g.in_c, 16 * 9);",
        case=direct("fprop", ONE),
    ),
    bug(
        "direct: a step of several taps",
        GATHER_MATHS,
        "while (channel >= channels) {",
        "if (channel >= channels) {",
        case=direct("fprop", replace(ONE, c=9)),
        including=(DIRECT_GATHER,),
    ),
    bug(
        "direct: rows of an even number",
        GATHER_MATHS,
        WIDER_H,
        "g.wider_h = 1,",
        case=direct("dgrad", ODD),
        including=(DIRECT_GATHER,),
    ),
    bug(
        "direct: columns of an even number",
        GATHER_MATHS,
        WIDER_W,
        "g.wider_w = 1;",
        case=direct("dgrad", ODD),
        including=(DIRECT_GATHER,),
    ),
    bug("direct wgrad: images", WGRAD_MATHS, *WGRAD_IMAGE, case=direct("wgrad", ONE), including=(DIRECT_WGRAD,)),
    bug(
        "direct wgrad: second tile of filters",
        DIRECT_WGRAD,
        "% row_tiles * kRows;",
        "% row_tiles * (kRows + 1);",
        case=direct("wgrad", ONE, config=1),
    ),
    bug(
        "direct wgrad: second tile of filter elements",
        DIRECT_WGRAD,
        "column0 = block % column_tiles * kColumns;",
        "column0 = block % column_tiles * (kColumns + 8);",
        case=direct("wgrad", POINT),
    ),
    bug(
        "direct wgrad: third group",
        DIRECT_WGRAD,
        "group = block / column_tiles / row_tiles;",
        "group = min(block / column_tiles / row_tiles, 1);",
        case=direct("wgrad", PAIR),
    ),
    bug(
        "direct wgrad: fourth slice",
        DIRECT_WGRAD,
        "slice_begin = static_cast<int32_t>(blockIdx.y)",
        "slice_begin = min(static_cast<int32_t>(blockIdx.y), 2)",
        case=direct("wgrad", ONE, split_k=3),
    ),
    bug(
        "direct wgrad: empty slices",
        DIRECT_WGRAD,
        "  // Every thread loads one column",
        "  if (slice_begin >= p.positions) return;\n  // Every thread loads one column",
        case=direct("wgrad", ONE, split_k=2),
    ),
    bug(
        "direct wgrad: long slices",
        DIRECT_WGRAD,
        "l0 < slice_end; l0 += kStep",
        "l0 < min(slice_end, slice_begin + 16); l0 += kStep",
        case=direct("wgrad", ONE, split_k=2),
    ),
    bug(
        "sums of slices that lanes do not share evenly",
        REDUCE,
        "each = (slices + kLanes - 1) / kLanes",
        "each = slices / kLanes",
        case=direct("wgrad", replace(ONE, h=24, w=24), split_k=40),
    ),
    bug("tensor cores: images", GATHER_MATHS, *IMAGE, case=gemm("bf16", "fprop", ONE), including=(GEMM_BF16,)),
    bug("tensor cores: second tile of rows", GEMM, GEMM_ROWS, GEMM_TWO_ROWS, case=gemm("bf16", "fprop", ONE)),
    bug("pointwise: second tile of rows", GEMM, GEMM_ROWS, GEMM_TWO_ROWS, case=gemm("bf16", "fprop", POINT)),
    bug("elements: second tile of rows", GEMM, GEMM_ROWS, GEMM_TWO_ROWS, case=gemm("bf16", "fprop", ONE, 4)),
    bug(
        "tensor cores: second tile of columns",
        GEMM,
        "column0 = block % column_tiles * Tile::kColumns;",
        "column0 = block % column_tiles * (Tile::kColumns + 8);",
        case=gemm("bf16", "dgrad", ONE),
    ),
    bug(
        "tensor cores: third group",
        GEMM,
        "group = block / column_tiles % g.groups;",
        "group = min(block / column_tiles % g.groups, 1);",
        case=gemm("bf16", "fprop", PAIR),
    ),
    bug(
        "tensor cores: a ring that is filled again",
        RING,
        "if (tile + kStages - 1 < tiles) load(refill);",
        "if (tile + kStages - 1 < tiles && tile < 2) load(refill);",
        case=gemm("bf16", "fprop", ONE),
        including=(GEMM_BF16,),
    ),
    bug(
        "pointwise: a ring that is filled again",
        RING,
        "if (tile + kStages - 1 < tiles) load(refill);",
        "if (tile + kStages - 1 < tiles && tile < 1) load(refill);",
        case=gemm("bf16", "fprop", POINT),
        including=(GEMM_BF16,),
    ),
    bug(
        "tensor cores: a ring that is not full",
        RING,
        "for (int32_t i = 0; i < kStages - 1; ++i) {\n    if (i < tiles) load(i);",
        "for (int32_t i = 0; i < kStages - 1; ++i) {\n    if (tiles > 3) load(i);",
        case=gemm("bf16", "fprop", ONE),
        including=(GEMM_BF16,),
    ),
    bug(
        "tensor cores: rows of an even number",
        GATHER_MATHS,
        WIDER_H,
        "g.wider_h = 1,",
        case=gemm("bf16", "dgrad", ODD),
        including=(GEMM_BF16,),
    ),
    bug(
        "tensor cores: part of a fragment's rows",
        FINISH,
        "if (m >= at.rows || count <= 0) return;",
        "if (m + 7 - row % 8 >= at.rows || count <= 0) return;",
        case=gemm("bf16", "fprop", replace(ONE, h=4, w=4)),
    ),
    bug(
        "tensor cores: the filter's second tile of channels",
        FILTER,
        "c0 = block % c_tiles * kTile;",
        "c0 = block % c_tiles * (kTile + 1);",
        case=gemm("bf16", "dgrad", ONE),
    ),
    bug(
        "tensor cores: the filter's second tile of filters",
        FILTER,
        "k0 = block % k_tiles * kTile;",
        "k0 = block % k_tiles * (kTile + 1);",
        case=gemm("bf16", "dgrad", ONE),
    ),
    bug(
        "tensor cores wgrad: images",
        WGRAD_MATHS,
        *WGRAD_IMAGE,
        case=gemm("bf16", "wgrad", ONE),
        including=(GEMM_WGRAD_CU,),
    ),
    bug(
        "tensor cores wgrad: second tile of filters",
        WGRAD_GEMM,
        "% row_tiles * Tile::kRows;",
        "% row_tiles * (Tile::kRows + 1);",
        case=gemm("bf16", "wgrad", ONE),
    ),
    bug(
        "tensor cores wgrad: third group",
        WGRAD_GEMM,
        "group = block / column_tiles / row_tiles;",
        "group = min(block / column_tiles / row_tiles, 1);",
        case=gemm("bf16", "wgrad", PAIR),
    ),
    bug(
        "tensor cores wgrad: empty slices",
        WGRAD_GEMM,
        "  Loader loader;\n",
        "  if (static_cast<int32_t>(blockIdx.y) * p.positions_per_slice >= p.positions) return;\n  Loader loader;\n",
        case=gemm("bf16", "wgrad", replace(ONE, h=8, w=8), split_k=2),
    ),
    bug(
        "tensor cores wgrad: long slices",
        WGRAD_GEMM,
        "(loader.end - loader.l + Dy::kDepth - 1) / Dy::kDepth : 0;",
        "min((loader.end - loader.l + Dy::kDepth - 1) / Dy::kDepth, 4) : 0;",
        case=gemm("bf16", "wgrad", replace(ONE, h=8, w=8), split_k=2),
    ),
    bug(
        "hopper: images",
        HOPPER,
        "pixel.n = g.decode_row(at.row0,",
        "pixel.n = 0 * g.decode_row(at.row0,",
        case=hopper("fprop", ONE),
    ),
    bug(
        "hopper: second tile of rows",
        HOPPER,
        "at->row0 = rest % row_tiles * kHopperRows,",
        "at->row0 = rest % row_tiles * (kHopperRows + 1),",
        case=hopper("fprop", ONE),
    ),
    bug(
        "hopper: channels behind the first step",
        HOPPER,
        "pixel.channel = channel0 + c;",
        "pixel.channel = channel0 + c % 64;",
        case=hopper("fprop", ONE),
    ),
    bug(
        "hopper: phases with a row more",
        HOPPER,
        "in = &maps.in[box_of_phase(at.phase_h, g.wider_h)]",
        "in = &maps.in[1]",
        case=hopper("dgrad", EVEN),
    ),
    bug(
        "hopper: phases of equal rows",
        HOPPER,
        "in = &maps.in[box_of_phase(at.phase_h, g.wider_h)]",
        "in = &maps.in[at.phase_h > 0]",
        case=hopper("dgrad", ODD),
    ),
    bug(
        "hopper wgrad: third group",
        HOPPER_WGRAD,
        "group = rest % p.groups,",
        "group = min(rest % p.groups, 1),",
        case=hopper("wgrad", PAIR),
    ),
    bug(
        "hopper wgrad: images",
        HOPPER_WGRAD,
        "grid.boxes.h.pixel(i), n}",
        "grid.boxes.h.pixel(i), 0 * n}",
        case=hopper("wgrad", ONE),
    ),
    bug(
        "hopper wgrad: a tap's second panel",
        HOPPER_WGRAD,
        "(at.panel0 + i) % grid.panels_per_tap * kPanel;",
        "0;",
        case=hopper("wgrad", ONE),
    ),
    bug(
        "depthwise: images",
        GATHER,
        "in + shape.in_offset(block.n, 0, 0)",
        "in + shape.in_offset(0, 0, 0)",
        case=Case("fprop", DW, "bf16"),
    ),
    bug(
        "depthwise: second tile of rows",
        GATHER,
        "oh0 = block.tile_h * Tile::kRows, ow0",
        "oh0 = block.tile_h * (Tile::kRows + 1), ow0",
        case=Case("dgrad", DW, "bf16"),
    ),
    bug(
        "depthwise: second tile of columns",
        GATHER,
        "ow0 = block.tile_w * Tile::kColumns;",
        "ow0 = block.tile_w * (Tile::kColumns + 1);",
        case=Case("fprop", DW_STRIDED, "bf16"),
    ),
    bug(
        "depthwise: second tile of channels",
        GATHER,
        "channel0 = block % channel_blocks * channels,",
        "channel0 = block % channel_blocks * (channels + 8),",
        case=Case("fprop", DW, "bf16"),
    ),
    bug(
        "depthwise dgrad of stride 2: second tile",
        GATHER,
        "w0 = block.tile_w * Tile::kColumns - odd_w;",
        "w0 = block.tile_w * (Tile::kColumns + 2) - odd_w;",
        case=Case("dgrad", DW_STRIDED, "bf16"),
    ),
    bug(
        "depthwise wgrad: images",
        TILED_WGRAD,
        "n = tile / tiles_w / tiles_h;",
        "n = 0 * tile;",
        case=Case("wgrad", DW, "bf16"),
    ),
    bug(
        "depthwise wgrad: second tile of a slice",
        TILED_WGRAD,
        "for (int32_t tile = begin; tile < end; ++tile) {",
        "for (int32_t tile = begin; tile < min(end, begin + 1); ++tile) {",
        case=Case("wgrad", DW, "bf16"),
    ),
    bug(
        "depthwise wgrad: second tile of rows",
        TILED_WGRAD,
        "% tiles_h * Tile::kRows;",
        "% tiles_h * (Tile::kRows + 1);",
        case=Case("wgrad", DW, "bf16"),
    ),
    bug(
        "depthwise generic: filters of a channel",
        GENERIC,
        "const int32_t group = (channel + e) / g.out_c;",
        "const int32_t group = channel + e;",
        case=Case("fprop", DW_ONE, "f16"),
    ),
    bug(
        "depthwise generic: one filter of a channel",
        GENERIC,
        "const int32_t group = (channel + e) / g.out_c;",
        "const int32_t group = (channel + e) / 2;",
        case=Case("fprop", DW_MANY, "f16"),
    ),
    bug(
        "depthwise generic dgrad: filters of a channel",
        GENERIC,
        "for (int32_t j = 0; j < g.in_c; ++j) {",
        "for (int32_t j = 0; j < 1; ++j) {",
        case=Case("dgrad", DW_ONE, "f16"),
    ),
    bug(
        "depthwise generic wgrad: filters of a channel",
        GENERIC,
        "x + there * p.c_all() + k / p.k)",
        "x + there * p.c_all() + k)",
        case=Case("wgrad", DW_ONE, "f16"),
    ),
    bug(
        "depthwise generic wgrad: more channels than a warp",
        GENERIC,
        "/ taps * kLanes + lane, channels",
        "/ taps * (kLanes + 1) + lane, channels",
        case=Case("wgrad", DW_ONE, "f16"),
    ),
    bug(
        "depthwise generic: images",
        GENERIC,
        "g.in_offset(n, ih, iw)",
        "g.in_offset(0, ih, iw)",
        case=Case("fprop", DW_ONE, "f16"),
    ),
]
