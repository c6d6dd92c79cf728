"""Scale, bias, residual, ReLU with its mask and mask in: one meaning in every family that has an epilogue."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from .emulated import Epilogue, KernelError, Problem, Settings, run_conv2d
from .reference import conv2d, finish, operands, pack_mask

PARTS = ("scale", "bias", "residual", "relu", "mask_in", "wide_bias", "relu_end")
# What only changes another part says nothing without it.
COMBINATIONS = [
    parts
    for count in range(len(PARTS) + 1)
    for parts in itertools.combinations(PARTS, count)
    if ("bias" in parts or "wide_bias" not in parts) and ("relu" in parts or "relu_end" not in parts)
]
# Runs that own whole bytes, then ragged channels whose mask words straddle rows, tiles and groups.
PROBLEMS = [
    Problem(n=1, c=16, k=72, h=5, w=3),
    Problem(n=2, c=11, k=37, h=4, w=5, stride=(2, 1)),
    Problem(n=1, c=40, k=40, h=5, w=5, groups=2, stride=(2, 2)),
    Problem(n=1, c=9, k=9, h=3, w=3, groups=3),
    Problem(n=1, c=8, k=8, h=3, w=3, r=1, s=1, pad=(0, 0), stride=(2, 2)),
]
FAMILIES = {
    "direct": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "implicit_gemm": [torch.float32, torch.float16, torch.bfloat16],
}


def integers(size: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randint(-4, 5, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(operator: str, problem: Problem, dtype: torch.dtype, parts: set[str], settings: Settings) -> None:
    first, second = operands(operator, problem, dtype, integers=True)
    size = problem.sizes["y" if operator == "fprop" else "x"]
    words = (size[0] * size[1] * size[2] * size[3] + 31) // 32
    keep_in = integers(size, torch.float32, 3) > 0 if "mask_in" in parts else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    epilogue = Epilogue(
        scale=integers((size[1],), wide, 4) if "scale" in parts else None,
        bias=integers((size[1],), wide if "wide_bias" in parts else dtype, 1) if "bias" in parts else None,
        residual=integers(size, dtype, 2) if "residual" in parts else None,
        relu="relu" in parts,
        relu_end=6.0 if "relu_end" in parts else float("inf"),
        mask_out=torch.full((words,), -1, dtype=torch.int32) if "relu" in parts else None,
        mask_in=None if keep_in is None else pack_mask(keep_in),
    )
    actual, kernel = run_conv2d(operator, problem, first, second, epilogue, settings)
    expected, keep = finish(conv2d(operator, problem, first, second), epilogue, keep_in, dtype)
    assert torch.equal(actual, expected.to(dtype)), (kernel, problem)
    if epilogue.mask_out is not None:
        assert torch.equal(epilogue.mask_out, pack_mask(keep)), (kernel, problem)


@pytest.mark.parametrize("operator", ["fprop", "dgrad"])
@pytest.mark.parametrize(("family", "dtype"), [(f, d) for f, dtypes in FAMILIES.items() for d in dtypes], ids=str)
def test_every_combination(family: str, dtype: torch.dtype, operator: str) -> None:
    for problem in PROBLEMS[:2]:
        for parts in COMBINATIONS:
            check(operator, problem, dtype, set(parts), Settings(family=family, allow_tf32=True))


# Tiled, twice, then generic: a multiplier of 2, and ragged channels.
DEPTHWISE = [
    Problem(n=1, c=40, k=40, h=5, w=6, groups=40),
    Problem(n=2, c=8, k=8, h=7, w=5, r=5, s=5, pad=(2, 2), stride=(2, 2), groups=8),
    Problem(n=1, c=8, k=16, h=5, w=5, groups=8, stride=(2, 1)),
    Problem(n=2, c=11, k=11, h=5, w=5, groups=11),
]


@pytest.mark.parametrize("operator", ["fprop", "dgrad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_depthwise(dtype: torch.dtype, operator: str) -> None:
    for problem in DEPTHWISE:
        for parts in ({"bias"}, {"scale", "bias"}, {"residual", "relu"}, {"mask_in"}, {"relu", "relu_end"}, set(PARTS)):
            check(operator, problem, dtype, parts, Settings(family="depthwise"))


@pytest.mark.parametrize("operator", ["fprop", "dgrad"])
@pytest.mark.parametrize(("family", "dtype"), [(f, d) for f, dtypes in FAMILIES.items() for d in dtypes], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS[2:], ids=str)
def test_groups_and_phases(family: str, dtype: torch.dtype, operator: str, problem: Problem) -> None:
    check(operator, problem, dtype, set(PARTS), Settings(family=family, allow_tf32=True))


def test_the_mask_is_of_the_rounded_value_and_nan_passes() -> None:
    """As torch: the gradient of relu(y) asks whether the stored y is at most 0, which no NaN is."""
    problem = Problem(n=1, c=1, k=1, h=1, w=3, r=1, s=1, pad=(0, 0))
    x = torch.tensor([1e-4, float("nan"), -1.0], dtype=torch.float16).view(1, 1, 1, 3)
    weight = torch.full((1, 1, 1, 1), 1e-4, dtype=torch.float16)  # 1e-8 rounds to 0 in fp16
    mask = torch.zeros(1, dtype=torch.int32)
    actual, _ = run_conv2d("fprop", problem, x, weight, Epilogue(relu=True, mask_out=mask), Settings(family="direct"))
    assert mask.item() == 0b010
    assert torch.equal(actual.isnan().flatten(), torch.tensor([False, True, False]))
    assert actual.flatten()[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_relu6_is_torchs_with_its_gradient(dtype: torch.dtype) -> None:
    """0 and 6 themselves have no gradient, infinity is clamped, NaN stays and passes; a plain ReLU passes infinity."""
    values = torch.tensor([-1, 0, 0.5, 5.96875, 6, 6.03125, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    problem = Problem(n=1, c=1, k=1, h=1, w=9, r=1, s=1, pad=(0, 0))
    x, weight = values.view(1, 1, 1, 9), torch.ones((1, 1, 1, 1), dtype=dtype)
    for end, stock in ((6.0, torch.nn.functional.relu6), (float("inf"), torch.relu)):
        mask = torch.zeros(1, dtype=torch.int32)
        epilogue = Epilogue(relu=True, relu_end=end, mask_out=mask)
        actual, _ = run_conv2d("fprop", problem, x, weight, epilogue, Settings(family="direct"))
        leaf = values.float().requires_grad_()
        expected = stock(leaf)
        assert torch.equal(actual.flatten().float().nan_to_num(nan=99), expected.detach().nan_to_num(nan=99))
        passes = torch.autograd.grad(expected, leaf, torch.ones_like(leaf))[0].bool() | leaf.isnan()
        assert torch.equal(mask, pack_mask(passes.view(1, 9, 1, 1)))


def test_a_wide_bias_is_added_before_the_only_rounding() -> None:
    problem = Problem(n=1, c=1, k=8, h=1, w=1, r=1, s=1, pad=(0, 0))
    x, weight = torch.full((1, 1, 1, 1), 256.0, dtype=torch.bfloat16), torch.ones((8, 1, 1, 1), dtype=torch.bfloat16)
    bias = torch.full((8,), 1.001)  # in bfloat16 a bias of 1, and 257 is half way between 256 and 258
    for family in FAMILIES:
        actual, _ = run_conv2d("fprop", problem, x, weight, Epilogue(bias=bias), Settings(family=family))
        assert torch.equal(actual.flatten(), torch.full((8,), 258.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("family", ["implicit_gemm", "hopper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_dgrad_with_a_factor_for_each_row_of_the_filter(family: str, dtype: torch.dtype, groups: int) -> None:
    problem = Problem(n=1, c=64 * groups, k=64 * groups, h=4, w=3, groups=groups, stride=(2, 1))
    dy, weight = operands("dgrad", problem, dtype, integers=True)
    scale = integers((problem.k,), torch.float32, 5)
    settings = Settings(family=family, config=2, allow_tf32=True, hopper=family == "hopper")
    actual, _ = run_conv2d("dgrad", problem, dy, weight, Epilogue(filter_scale=scale), settings)
    expected = conv2d("dgrad", problem, dy, weight.double() * scale.double().view(-1, 1, 1, 1))
    assert torch.equal(actual, expected.to(dtype))


def test_what_an_operator_cannot_do_is_refused() -> None:
    problem = Problem(n=1, c=2, k=2, h=3, w=3)
    words = torch.zeros(1, dtype=torch.int32)
    tensors, scaled = operands("dgrad", problem, torch.float32, True), Epilogue(filter_scale=torch.ones(2))
    with pytest.raises(KernelError, match="invalid_argument"):  # reads the filter as it is
        run_conv2d("dgrad", problem, *tensors, scaled, Settings(family="direct"))
    with pytest.raises(KernelError, match="invalid_argument"):
        run_conv2d("wgrad", problem, *operands("wgrad", problem, torch.float32, True), Epilogue(relu=True))
    with pytest.raises(KernelError, match="invalid_argument"):
        run_conv2d("fprop", problem, *operands("fprop", problem, torch.float32, True), Epilogue(mask_out=words))
    with pytest.raises(KernelError, match="invalid_argument"):
        run_conv2d("fprop", problem, *operands("fprop", problem, torch.float32, True), Epilogue(relu_end=0.0))
