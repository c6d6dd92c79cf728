"""Convolutions for conv_driver.cpp, as the text of its arguments."""

from __future__ import annotations

from dataclasses import dataclass

from tests.kernels.emulated import FAMILIES, OPERATORS, Problem

DTYPES = ("f32", "f64", "f16", "bf16")  # in the order of csrc/core/problem.h
EPILOGUES = {
    name: 1 << bit
    for bit, name in enumerate(
        ("bias", "residual", "relu", "mask_out", "mask_in", "relu6", "wide_bias", "scale", "filter_scale")
    )
}


@dataclass(frozen=True)
class Case:
    """One launch. `family` None takes what select() chooses, and its config and split_k with it."""

    operator: str
    problem: Problem
    dtype: str = "f32"
    family: str | None = None
    config: int = 0
    split_k: int = 1
    epilogue: tuple[str, ...] = ()
    allow_tf32: bool = False

    def __str__(self) -> str:
        flags = sum(EPILOGUES[name] for name in self.epilogue)
        family = FAMILIES[self.family] if self.family else -1
        head = [OPERATORS.index(self.operator), DTYPES.index(self.dtype), family, self.config, self.split_k, flags]
        return ",".join(map(str, [*head, int(self.allow_tf32), *self.problem.flat]))


SMALL = Problem(n=1, c=8, h=5, w=4, k=16)
STRIDED = Problem(n=2, c=6, h=9, w=8, k=9, stride=(2, 2), pad=(1, 1))
DILATED = Problem(n=1, c=8, h=9, w=7, k=8, stride=(2, 1), dilation=(2, 2), pad=(2, 2))
GROUPED = Problem(n=2, c=6, h=5, w=5, k=12, groups=3)
GAPPED = Problem(n=2, c=3, h=4, w=4, k=3, r=1, s=1, pad=(0, 0), stride=(3, 2))  # phases of dgrad without taps
WIDE = Problem(n=1, c=40, h=6, w=6, k=72)
EVERY_EPILOGUE = ("scale", "bias", "wide_bias", "residual", "relu", "relu6", "mask_out", "mask_in")

DIRECT = [
    *(Case(op, p, family="direct") for op in OPERATORS for p in (SMALL, STRIDED, DILATED, GROUPED, GAPPED)),
    *(Case(op, WIDE, "bf16", "direct") for op in OPERATORS),
    *(Case(op, p, "f16", "direct", epilogue=EVERY_EPILOGUE) for op in ("fprop", "dgrad") for p in (SMALL, STRIDED)),
    Case("fprop", WIDE, "f64", "direct", epilogue=("relu", "mask_out")),
    Case("fprop", WIDE, "bf16", "direct", epilogue=("bias", "relu", "mask_out")),
    Case("wgrad", SMALL, family="direct", split_k=3),
    Case("wgrad", STRIDED, "f16", "direct", split_k=4),
]

CHUNKS = Problem(n=1, c=16, h=6, w=5, k=40)
POINTWISE = Problem(n=1, c=40, h=5, w=5, k=24, r=1, s=1, pad=(0, 0))
GEMM_STRIDED = Problem(n=2, c=8, h=9, w=8, k=16, stride=(2, 2))
GEMM_DILATED = Problem(n=1, c=8, h=9, w=9, k=8, stride=(2, 1), dilation=(2, 3), pad=(2, 3))
GEMM_GROUPED = Problem(n=1, c=24, h=5, w=4, k=48, groups=3)
GEMM_GAPPED = Problem(n=2, c=8, h=4, w=4, k=8, r=1, s=1, pad=(0, 0), stride=(3, 2))
GEMM_LONG = Problem(n=2, c=8, h=9, w=8, k=16)  # 144 positions, five k-tiles of 16-bit types
RAGGED = Problem(n=1, c=6, h=5, w=6, k=10)
UNEVEN = Problem(n=1, c=3, h=5, w=5, k=8)  # an odd number of filter elements


def gemm(
    dtype: str, operator: str, problem: Problem, config: int = 2, epilogue: tuple[str, ...] = (), split_k: int = 1
) -> Case:
    return Case(operator, problem, dtype, "implicit_gemm", config, split_k, epilogue, allow_tf32=True)


def gemm_cases(dtype: str) -> list[Case]:
    """Each way to load, each tile and each epilogue once."""
    return [
        *(gemm(dtype, op, CHUNKS, config) for op in ("fprop", "dgrad") for config in range(4)),
        *(gemm(dtype, op, POINTWISE, epilogue=EVERY_EPILOGUE) for op in ("fprop", "dgrad")),
        *(gemm(dtype, "dgrad", p, epilogue=EVERY_EPILOGUE) for p in (GEMM_STRIDED, GEMM_DILATED, GEMM_GAPPED)),
        gemm(dtype, "fprop", GEMM_DILATED),
        *(gemm(dtype, "dgrad", p, epilogue=("filter_scale",)) for p in (GEMM_GROUPED, GEMM_STRIDED)),
        gemm(dtype, "fprop", CHUNKS, epilogue=("bias", "relu", "mask_out")),
        *(gemm(dtype, op, GEMM_GROUPED) for op in ("fprop", "dgrad")),
        *(gemm(dtype, op, RAGGED, 4, EVERY_EPILOGUE) for op in ("fprop", "dgrad")),
        *(gemm(dtype, "wgrad", CHUNKS, config, split_k=config + 1) for config in range(3)),
        gemm(dtype, "wgrad", GEMM_STRIDED, split_k=2),
        *(gemm(dtype, "wgrad", p) for p in (POINTWISE, GEMM_STRIDED, GEMM_DILATED, GEMM_GROUPED, RAGGED, UNEVEN)),
    ]


HOPPER_WIDE = Problem(n=1, c=64, h=9, w=15, k=72)  # two tiles of rows and of 64 columns, a tail in both
HOPPER_RAGGED = Problem(n=2, c=24, h=6, w=7, k=40, stride=(2, 2))


def hopper(
    operator: str,
    problem: Problem,
    dtype: str = "bf16",
    config: int = 2,
    epilogue: tuple[str, ...] = (),
    split_k: int = 1,
) -> Case:
    return Case(operator, problem, dtype, "hopper", config, split_k, epilogue, allow_tf32=True)


HOPPER = [
    *(hopper(op, HOPPER_WIDE, config=config) for op in ("fprop", "dgrad") for config in range(3)),
    hopper("dgrad", HOPPER_WIDE, epilogue=("filter_scale",)),
    *(hopper(op, p) for op in OPERATORS for p in (POINTWISE, GEMM_STRIDED, GEMM_DILATED, GEMM_GAPPED)),
    *(
        hopper("wgrad", HOPPER_WIDE, dtype, config, split_k=1 + config)
        for dtype in ("bf16", "f16")
        for config in range(3)
    ),
    *(
        hopper(op, HOPPER_RAGGED, dtype, 1, EVERY_EPILOGUE)
        for op in ("fprop", "dgrad")
        for dtype in ("bf16", "f16", "f32")
    ),
]

DEPTHWISE_3 = Problem(n=2, c=16, h=9, w=18, k=16, groups=16)
DEPTHWISE_5 = Problem(n=1, c=40, h=9, w=11, k=40, r=5, s=5, pad=(2, 1), stride=(2, 2), groups=40)
DEPTHWISE_7 = Problem(n=1, c=8, h=8, w=7, k=8, r=7, s=7, pad=(3, 3), groups=8)
DEPTHWISE_GENERIC = Problem(n=1, c=10, h=8, w=9, k=10, dilation=(2, 1), stride=(1, 3), groups=10)
DEPTHWISE_MULTIPLIED = Problem(n=1, c=5, h=6, w=5, k=15, groups=5)


def depthwise_cases() -> list[Case]:
    """What select() takes for depthwise problems: tiled kernels for three of them, generic ones for the rest."""
    tiled, generic = (DEPTHWISE_3, DEPTHWISE_5, DEPTHWISE_7), (DEPTHWISE_GENERIC, DEPTHWISE_MULTIPLIED)
    return [
        *(Case(op, p, dtype) for op in OPERATORS for p in tiled for dtype in ("f32", "bf16")),
        *(Case(op, p, dtype) for op in OPERATORS for p in generic for dtype in ("f64", "f16")),
        *(Case(op, p, "f16", epilogue=EVERY_EPILOGUE) for op in ("fprop", "dgrad") for p in (*tiled[:2], *generic)),
    ]


DEPTHWISE = depthwise_cases()
GEMM = {dtype: gemm_cases(dtype) for dtype in ("bf16", "f16", "f32")}


def texts(cases: list[Case]) -> tuple[str, ...]:
    return tuple(map(str, cases))
