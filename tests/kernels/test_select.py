"""The choice of a kernel: pure, printable, and refused with a reason."""

from __future__ import annotations

import pytest
import torch

from .emulated import OPERATORS, KernelError, Problem, Selection, Settings, run_conv2d, select

H200 = Settings(sm=90, sm_count=132)


def pick(operator: str, dtype: torch.dtype = torch.bfloat16, settings: Settings = H200, **sizes: object) -> Selection:
    return select(operator, Problem(**{"n": 32, "c": 64, "k": 64, "h": 56, "w": 56, **sizes}), dtype, settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("operator", OPERATORS)
def test_tensor_cores_take_the_types_they_have(operator: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert pick(operator, dtype).family == "implicit_gemm"
    assert pick(operator, torch.float32).family == "direct", "fp32 stays fp32 unless tf32 is allowed"
    assert pick(operator, torch.float32, Settings(sm=90, sm_count=132, allow_tf32=True)).family == "implicit_gemm"
    assert pick(operator, torch.float64).family == "direct"
    assert pick(operator, torch.float16, Settings(sm=75, sm_count=68)).family == "direct", "cp.async begins at sm_80"


@pytest.mark.parametrize("operator", OPERATORS)
def test_groups(operator: str) -> None:
    assert pick(operator, groups=8).family == "direct", "8 channels per group"
    assert pick(operator, groups=4).family == "implicit_gemm", "16 channels per group"
    assert pick(operator, groups=64).kernel == f"depthwise_{operator}_tiled"
    assert pick(operator, groups=64, dilation=(2, 2), pad=(2, 2)).kernel == f"depthwise_{operator}_generic"
    assert pick(operator, groups=64, k=128).kernel == f"depthwise_{operator}_generic"
    assert pick(operator, c=1).family == "implicit_gemm", "one input channel alone is no depthwise convolution"


def test_tiles_follow_the_problem() -> None:
    kernels = {
        "implicit_gemm_fprop_128x128": {"c": 256, "k": 256},
        "implicit_gemm_fprop_128x64": {"c": 64, "k": 64},
        "implicit_gemm_fprop_128x32": {"c": 64, "k": 32},
        "implicit_gemm_fprop_64x64": {"n": 1, "c": 512, "k": 512, "h": 14, "w": 14},
        "implicit_gemm_fprop_64x64_elements": {"c": 3, "k": 64},
    }
    for kernel, sizes in kernels.items():
        assert pick("fprop", **sizes).kernel == kernel, sizes


def test_workspaces() -> None:
    assert pick("fprop").workspace == 0
    assert pick("dgrad").workspace == 64 * 64 * 9 * 2, "the transposed filter"
    wgrad = pick("wgrad")
    assert wgrad.split_k > 1, "a small dw needs more than its own tiles to fill a device"
    assert wgrad.workspace == wgrad.split_k * 64 * 64 * 9 * 4
    large = pick("wgrad", c=2048, k=2048)
    assert (large.split_k, large.workspace) == (1, 0)
    assert pick("wgrad", torch.float64, c=8, k=8, groups=8).workspace % (8 * 9 * 8) == 0


def test_the_same_question_gets_the_same_answer() -> None:
    assert pick("wgrad") == pick("wgrad")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("sizes", [{"n": 1 << 20}, {"c": 1 << 30, "k": 1}, {"dilation": (1 << 30, 1)}], ids=str)
def test_what_does_not_fit_is_refused_with_a_reason(operator: str, sizes: dict[str, object]) -> None:
    refused = pick(operator, **sizes)
    assert refused.family == "none"
    assert "2^30" in refused.reason


def test_a_stride_beyond_the_grid_is_refused_for_dgrad_alone() -> None:
    sizes = {"n": 1, "c": 1, "k": 1, "h": 1, "w": 70000, "r": 1, "s": 1, "pad": (0, 0), "stride": (1, 70000)}
    assert pick("dgrad", **sizes).reason == "a stride beyond 65535"
    assert pick("fprop", **sizes).family == "implicit_gemm"


def test_every_choice_has_a_kernel_and_a_reason() -> None:
    for operator in OPERATORS:
        for sizes in ({}, {"groups": 64}, {"groups": 32}, {"c": 3}, {"r": 1, "s": 1, "pad": (0, 0)}):
            for dtype in (torch.bfloat16, torch.float32):
                chosen = pick(operator, dtype, **sizes)
                assert operator in chosen.kernel
                assert chosen.reason


def test_launching_without_a_kernel_is_an_error() -> None:
    problem = Problem(n=1, c=1, k=1, h=1, w=70000, r=1, s=1, pad=(0, 0), stride=(1, 70000))
    with pytest.raises(KernelError, match="unsupported"):
        run_conv2d("dgrad", problem, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
