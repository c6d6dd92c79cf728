"""Ways to misread the PTX manual or a convolution, planted where the comparisons must see them.

A misreading of the manual that emulator and kernels share passes every test of the two against each other: only
NVIDIA's own sources tell. So each is planted in both, where both have it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.emulator.build import Patch, Planted
from tests.emulator.plants.plant import HOPPER, HOPPER_BF16, HOPPER_LAUNCH, HOPPER_WGRAD, PIXEL_BOX, SHARED_TILE

TENSOR_CORE = "csrc/emulator/tensor_core.cpp"
WGMMA = "csrc/emulator/wgmma.cpp"
COPY = "csrc/emulator/tensor_copy.cpp"
COPY_HEADER = "csrc/emulator/tensor_copy.h"
ENCODE = "csrc/emulator/encode_tensor_map.cpp"
TENSOR_MAP = "csrc/kernels/hopper/tensor_map.cu"
PTX_SM90 = "csrc/kernels/hopper/ptx_sm90.h"
OURS = "tests/truth/emulated.cu"
HOPPER_F16 = "csrc/kernels/hopper/hopper_gemm_f16.cu"
WGRAD = "csrc/kernels/hopper/hopper_wgrad.cu"
PLANS = "2x9x9x64 to 128, 3x3, pad 1,1, stride 1,1, dilation 1,1: plans, 128x128"


@dataclass(frozen=True)
class Misreading:
    """`shows`: the comparison that must differ; `quick`: part of `make test`."""

    name: str
    planted: Planted
    shows: str
    quick: bool = False


MISREADINGS = (
    Misreading(
        "registers of mma's A go along the reduction first",
        Planted(
            (
                Patch(TENSOR_CORE, "a[g + 8 * (i % 2)][k + 8 * (i / 2)] =", "a[g + 8 * (i / 2)][k + 8 * (i % 2)] ="),
                Patch(
                    TENSOR_CORE,
                    "a[g + 8 * (i % 2)][k + 8 * (i / 2) + 1] =",
                    "a[g + 8 * (i / 2)][k + 8 * (i % 2) + 1] =",
                ),
            )
        ),
        shows="mma bf16: fragments",
        quick=True,
    ),
    Misreading(
        "ldmatrix.trans puts the later row into the lower half",
        Planted(
            (
                Patch(
                    TENSOR_CORE, "low = first.transposed ? element[c][r]", "low = first.transposed ? element[c + 1][r]"
                ),
                Patch(
                    TENSOR_CORE,
                    "high = first.transposed ? element[c + 1][r]",
                    "high = first.transposed ? element[c][r]",
                ),
            )
        ),
        shows="ldmatrix x2.trans",
    ),
    Misreading(
        "accumulators of wgmma go down the rows first",
        Planted(
            (
                Patch(
                    WGMMA,
                    "warp.values[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2]",
                    "warp.values[lane / 4 + 8 * (i % 2)][8 * (i / 4) + 2 * (lane % 4) + i / 2 % 2]",
                ),
            )
        ),
        shows="wgmma bf16 K-major, 64x64: products",
    ),
    Misreading(
        "the swizzle takes its bits one place higher",
        Planted(
            (
                Patch(COPY_HEADER, "(address >> 7 & 7) << 4", "(address >> 8 & 7) << 4"),
                Patch(SHARED_TILE, "((at >> 7 & 7) << 4)", "((at >> 8 & 7) << 4)"),
            ),
            including=(COPY, WGMMA, OURS),
        ),
        shows="wgmma tf32 K-major, 64x64: tiles in shared memory",
    ),
    Misreading(
        "a descriptor has its stride before its leading offset",
        Planted(
            (
                Patch(WGMMA, "leading((bits >> 16 & 0x3fff) << 4)", "leading((bits >> 32 & 0x3fff) << 4)"),
                Patch(WGMMA, "stride((bits >> 32 & 0x3fff) << 4)", "stride((bits >> 16 & 0x3fff) << 4)"),
                Patch(SHARED_TILE, "(leading >> 4 & 0x3fff) << 16", "(leading >> 4 & 0x3fff) << 32"),
                Patch(SHARED_TILE, "(stride >> 4 & 0x3fff) << 32", "(stride >> 4 & 0x3fff) << 16"),
            ),
            including=(OURS,),
        ),
        shows="wgmma f16 K-major, 64x128: descriptors",
    ),
    Misreading(
        "the leading offset of an MN-major operand goes along the reduction",
        Planted(
            (
                Patch(
                    WGMMA, "i / across * at.leading + l / 8 * at.stride", "i / across * at.stride + l / 8 * at.leading"
                ),
                Patch(
                    SHARED_TILE,
                    "* 2 * kSwizzleAtom, panel, kSwizzleAtom);",
                    "* 2 * kSwizzleAtom, kSwizzleAtom, panel);",
                ),
            ),
            including=(OURS,),
        ),
        shows="wgmma bf16 MN-major, 64x128: products",
    ),
    Misreading(
        "the upper corner of a pixel box lies outside of it",
        Planted(
            (
                Patch(COPY, "w <= static_cast<int64_t>(map.sizes[1])", "w < static_cast<int64_t>(map.sizes[1])"),
                Patch(COPY, "h <= static_cast<int64_t>(map.sizes[2])", "h < static_cast<int64_t>(map.sizes[2])"),
                Patch(PIXEL_BOX, "- (in_size - 1);", "- (in_size - 2);"),
            ),
            including=(HOPPER_BF16,),
        ),
        shows="fprop bf16 2x9x9x64 to 128, 3x3, pad 1,1, stride 1,1, dilation 1,1: plans, 128x128",
    ),
    Misreading(
        "corners of a pixel box are h before w, as cuda.h words it",
        Planted(
            (
                Patch(TENSOR_MAP, "lower[2] = {w.lower, h.lower}", "lower[2] = {h.lower, w.lower}"),
                Patch(
                    TENSOR_MAP,
                    "upper[2] = {w.upper[tensor.box_w], h.upper[tensor.box_h]}",
                    "upper[2] = {h.upper[tensor.box_h], w.upper[tensor.box_w]}",
                ),
                Patch(ENCODE, "map->lower[i] = static_cast<int8_t>", "map->lower[1 - i] = static_cast<int8_t>"),
                Patch(ENCODE, "map->upper[i] = static_cast<int8_t>", "map->upper[1 - i] = static_cast<int8_t>"),
            )
        ),
        shows="fprop bf16 1x14x11x192 to 64, 5x3, pad 2,1, stride 1,1, dilation 1,1: elements copied, 128x128",
        quick=True,
    ),
    Misreading(
        "offsets of taps count traversal strides",
        Planted(
            (
                Patch(COPY, "w + copy.offset[0]", "w + copy.offset[0] * map.element_strides[1]"),
                Patch(COPY, "h + copy.offset[1]", "h + copy.offset[1] * map.element_strides[2]"),
            )
        ),
        shows="wgrad bf16 2x9x9x64 to 128, 3x3, pad 1,1, stride 2,2, dilation 1,1: elements copied, 128x128",
    ),
    Misreading(
        "offsets of taps are h before w in the instruction",
        Planted(
            (
                Patch(
                    PTX_SM90,
                    '"h"(static_cast<uint16_t>(offset_w)), "h"(static_cast<uint16_t>(offset_h))',
                    '"h"(static_cast<uint16_t>(offset_h)), "h"(static_cast<uint16_t>(offset_w))',
                ),
            )
        ),
        shows="ptx::copy_im2col",
        quick=True,
    ),
    Misreading(
        "fp16 is the driver's FLOAT64",
        Planted((Patch(TENSOR_MAP, "CU_TENSOR_MAP_DATA_TYPE_FLOAT16", "CU_TENSOR_MAP_DATA_TYPE_FLOAT64"),)),
        shows=f"fprop f16 {PLANS}",
        quick=True,
    ),
    Misreading(
        "fp16 is copied as bf16",
        Planted(
            (Patch(HOPPER_LAUNCH, "(g, launch.dtype, launch.in()", "(g, DType::bf16, launch.in()"),),
            including=(HOPPER_F16,),
        ),
        shows=f"dgrad f16 {PLANS}",
    ),
    Misreading(
        "element strides are the box",
        Planted((Patch(TENSOR_MAP, "of.sizes, of.strides, box, of.ones, CU_", "of.sizes, of.strides, box, box, CU_"),)),
        shows=f"dgrad bf16 {PLANS}",
    ),
    Misreading(
        "the driver is asked for an im2col map of nothing",
        Planted(
            (
                Patch(
                    TENSOR_MAP,
                    "4, const_cast<void*>(tensor.data), of.sizes, of.strides, lower",
                    "4, nullptr, of.sizes, of.strides, lower",
                ),
            )
        ),
        shows=f"wgrad bf16 {PLANS}",
    ),
    Misreading(
        "pixels are gathered from the filter",
        Planted(
            (Patch(HOPPER_LAUNCH, "pixels{dtype, in, g.batch", "pixels{dtype, filter, g.batch"),),
            including=(HOPPER_BF16,),
        ),
        shows=f"fprop bf16 {PLANS}",
    ),
    Misreading(
        "element strides of pixels are h before w",
        Planted(
            (
                Patch(
                    TENSOR_MAP,
                    "{1, static_cast<uint32_t>(w.stride), static_cast<uint32_t>(h.stride), 1}",
                    "{1, static_cast<uint32_t>(h.stride), static_cast<uint32_t>(w.stride), 1}",
                ),
            )
        ),
        shows="wgrad bf16 2x8x8x64 to 128, 3x3, pad 1,1, stride 3,2, dilation 1,2: plans, 128x128",
    ),
    Misreading(
        "a matrix of pixels has those of one image",
        Planted(
            (
                Patch(
                    HOPPER_LAUNCH, "static_cast<int64_t>(g.batch) * g.in_h * g.in_w;", "int64_t{1} * g.in_h * g.in_w;"
                ),
            ),
            including=(HOPPER_BF16,),
        ),
        shows="fprop bf16 7x8x8x64 to 128, 1x1, pad 0,0, stride 1,1, dilation 1,1: plans, 128x128",
    ),
    Misreading(
        "rows of the filter meet the taps from the last one on",
        Planted(
            (Patch(HOPPER, "r = at.h.filter_first + t * at.h.filter_step,", "r = at.h.taps - 1 - t,"),),
            including=(HOPPER_BF16,),
        ),
        shows=f"fprop bf16 {PLANS}",
        quick=True,
    ),
    Misreading(
        "taps of the transposed filter go down its columns",
        Planted(
            (Patch(HOPPER, "&maps.filter, full, c, r * g.w.taps + s,", "&maps.filter, full, c, s * g.h.taps + r,"),),
            including=(HOPPER_BF16,),
        ),
        shows=f"dgrad bf16 {PLANS}",
    ),
    Misreading(
        "positions of dy come from the last one on",
        Planted(
            (
                Patch(
                    HOPPER_WGRAD,
                    "at.row0 + half * kPanel, l);",
                    "at.row0 + half * kPanel, at.first + (at.last - 1 - l) / kPanel * kPanel);",
                ),
            ),
            including=(WGRAD,),
        ),
        shows=f"wgrad bf16 {PLANS}",
    ),
    Misreading(
        "the second operand goes where the first one is",
        Planted(
            (Patch(HOPPER, "ptx::copy_tile(stage + Tile::kABytes, &maps", "ptx::copy_tile(stage, &maps"),),
            including=(HOPPER_BF16,),
        ),
        shows=f"dgrad bf16 {PLANS}",
    ),
)
