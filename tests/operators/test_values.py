"""Values and gradients are torch's: exactly on integers, and by gradcheck in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from freezekit.functional import conv2d, conv2d_dgrad, conv2d_wgrad
from tests.cases import CASES, Case

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def gradients(conv, tensors: tuple[Tensor | None, ...], case: Case) -> list[Tensor]:
    """Output and gradients of sum(y * g) with an integer g."""
    leaves = [t.detach().requires_grad_() if t is not None else None for t in tensors]
    y = conv(*leaves, **case.settings)
    g = (torch.arange(y.numel(), device=y.device) % 5 - 2).to(y.dtype).view(y.shape)
    return [y, *grad(y, [leaf for leaf in leaves if leaf is not None], g)]


def reference(tensors: tuple[Tensor | None, ...], case: Case) -> list[Tensor]:
    return gradients(F.conv2d, tuple(t if t is None else t.double().cpu() for t in tensors), case)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_are_exact(case: Case, dtype: torch.dtype, channels_last: bool, place: tuple[str, str]) -> None:
    _, device = place
    tensors = case.tensors(dtype, device, integers=True, channels_last=channels_last)
    for ours, exact in zip(gradients(conv2d, tensors, case), reference(tensors, case), strict=True):
        assert ours.dtype == dtype
        # Sums past 256 are not integers of bfloat16: the exact value is rounded once, as the kernels round it.
        assert torch.equal(ours.double().cpu(), exact.to(dtype).double())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_random_values_are_within_rounding(case: Case, place: tuple[str, str]) -> None:
    _, device = place
    tensors = case.tensors(torch.float32, device)
    for ours, exact in zip(gradients(conv2d, tensors, case), reference(tensors, case), strict=True):
        # Terms of one sum times float32's unit roundoff, against the magnitude of the terms.
        terms = max(1, case.r * case.s * case.c, ours.numel() and case.n * case.h * case.w)
        bound = 4 * terms * 2**-24 * max(1.0, exact.abs().max().item() if exact.numel() else 1.0)
        assert ours.shape == exact.shape
        assert ((ours.double().cpu() - exact).abs() <= bound).all()


@pytest.mark.parametrize("case", [c for c in CASES if c.n and c.h * c.w < 60], ids=str)
def test_derivatives(case: Case, place: tuple[str, str]) -> None:
    _, device = place
    tensors = [t.requires_grad_() for t in case.tensors(torch.float64, device) if t is not None]

    def f(*args: Tensor) -> Tensor:
        return conv2d(*args, **({"bias": None} if len(args) < 3 else {}), **case.settings)

    assert gradcheck(f, tensors, fast_mode=True)
    assert gradgradcheck(f, tensors, fast_mode=True)


@pytest.mark.parametrize("case", [CASES[2], CASES[6]], ids=str)
def test_derivatives_of_the_gradients(case: Case, place: tuple[str, str]) -> None:
    _, device = place
    x, w, _ = case.tensors(torch.float64, device)
    dy = torch.randn_like(conv2d(x, w, **case.settings))
    for t in (x, w, dy):
        t.requires_grad_()

    def dgrad(dy: Tensor, w: Tensor) -> Tensor:
        return conv2d_dgrad(dy, w, case.input_size, **case.settings)

    def wgrad(dy: Tensor, x: Tensor) -> Tensor:
        return conv2d_wgrad(dy, x, case.weight_size, **case.settings)

    for f, args in ((dgrad, (dy, w)), (wgrad, (dy, x))):
        assert gradcheck(f, args, fast_mode=True)
        assert gradgradcheck(f, args, fast_mode=True)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 1)])
@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_string_padding(padding: str, kernel: tuple[int, int], dilation: int | tuple[int, int]) -> None:
    x, w = torch.randn(2, 3, 9, 10).requires_grad_(), torch.randn(4, 3, *kernel).requires_grad_()
    ours, stock = (f(x, w, padding=padding, dilation=dilation) for f in (conv2d, F.conv2d))
    torch.testing.assert_close(ours, stock)
    for a, b in zip(grad(ours.square().sum(), (x, w)), grad(stock.square().sum(), (x, w)), strict=True):
        torch.testing.assert_close(a, b)


def test_unbatched() -> None:
    x, w = torch.randn(3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    y = conv2d(x, w)
    assert torch.equal(y, F.conv2d(x, w))
    assert torch.equal(grad(y.sum(), x)[0], grad(F.conv2d(x, w).sum(), x)[0])
    y.add_(1)  # as stock's, it is no view that forbids editing


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_is_torch_s(dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 4, 6, 6, dtype=dtype).requires_grad_(), torch.randn(4, 2, 3, 3, dtype=dtype).requires_grad_()
    ours, stock = (f(x, w, padding=1, groups=2) for f in (conv2d, F.conv2d))
    assert torch.equal(ours, stock)
    for a, b in zip(grad(ours.abs().sum(), (x, w)), grad(stock.abs().sum(), (x, w)), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(conv2d(x, w, groups=2), F.conv2d(x, w, groups=2))
    with torch.inference_mode():
        assert torch.equal(conv2d(x.detach().clone(), w, groups=2), F.conv2d(x, w, groups=2))


def test_meta() -> None:
    x, w = torch.empty(2, 3, 9, 9, device="meta", requires_grad=True), torch.empty(4, 3, 3, 3, device="meta")
    y = conv2d(x, w, stride=2)
    assert y.is_meta
    assert y.shape == (2, 4, 4, 4)
    (dx,) = grad(y.sum(), x)
    assert dx.is_meta
    assert dx.shape == x.shape


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dgrad_on_a_cpu_is_aten_s_to_the_bit(dtype: torch.dtype, settings: dict[str, int], channels_last: bool) -> None:
    """It is the same call, with a stand-in for the input that takes no memory."""
    x, w = torch.randn(1, 4, 9, 9).to(dtype), torch.randn(6, 4 // settings.get("groups", 1), 3, 3).to(dtype)
    if channels_last:
        x, w = x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    ys = [conv(leaf, w, **settings) for conv, leaf in zip((conv2d, F.conv2d), leaves)]
    dy = torch.randn_like(ys[1])
    ours, stock = (grad(y, leaf, dy)[0] for y, leaf in zip(ys, leaves))
    assert torch.equal(ours, stock)
