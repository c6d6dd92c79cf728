"""A frozen block of 3 x 3 on a CPU, which takes fewer multiplications by Winograd's F(2 x 2, 3 x 3)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freezekit.fusion import fuse
from tests.observe import bytes_kept

USES = torch.backends.cpu.get_cpu_capability()
pytestmark = pytest.mark.skipif(USES not in ("AVX2", "AVX512"), reason="it is used with AVX2 and AVX-512 alone")
ops = torch.ops.freezekit
LAYOUTS = [torch.channels_last, *([torch.contiguous_format] if USES == "AVX512" else [])]
# Size of x, filters, padding: odd and even sizes, tiles that hang over the end, blocks of tiles that end inside rows.
CASES = [
    ((1, 64, 40, 40), 64, (1, 1)),
    ((3, 64, 29, 31), 96, (1, 1)),
    ((2, 96, 17, 32), 64, (0, 0)),
    ((1, 64, 21, 31), 64, (2, 0)),
    ((2, 64, 21, 28), 64, (0, 2)),
    ((1, 64, 26, 33), 96, (4, 3)),
]
U = 2.0**-24  # a rounding, of numbers near 1


def laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=layout)


def operands(case: tuple, layout: torch.memory_format, integers: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The input, the filters and a gradient of the result."""
    size, filters, padding = case
    torch.manual_seed(0)
    make = (lambda *s: torch.randint(-4, 5, s).float()) if integers else torch.randn
    x, w = make(*size), make(filters, size[1], 3, 3)
    w += (w >= 0) * integers  # no zeros: many of them are left to direct convolution
    dy = make(*F.conv2d(x[:, :1], w[:, :1], padding=padding).shape)
    return laid_out(x, layout), laid_out(w, layout), laid_out(dy, layout)


def fprop(x: Tensor, w: Tensor, padding: tuple, activation: str = "none", shift: Tensor | None = None) -> Tensor:
    """A convolution, with a norm whose scale is 1: what a block adds to it changes no bit."""
    one = torch.ones(w.shape[0])
    norm = {"norm_weight": one, "norm_bias": shift, "running_mean": torch.zeros_like(one), "running_var": one}
    return ops.frozen_conv2d(x, w, None, None, activation, [1, 1], list(padding), **norm)[0]


def dgrad(dy: Tensor, w: Tensor, size: torch.Size, padding: tuple) -> Tensor:
    last = not dy.is_contiguous() or not w.is_contiguous()
    return ops.frozen_conv2d_dgrad(dy, w, size, None, None, [1, 1], list(padding), channels_last=last)


def stock_dgrad(dy: Tensor, w: Tensor, size: torch.Size, padding: tuple) -> Tensor:
    x = torch.zeros(size, dtype=dy.dtype)
    if not dy.is_contiguous():
        x = laid_out(x, torch.channels_last)
    x.requires_grad_()
    return torch.autograd.grad(F.conv2d(x, w, padding=padding), x, dy)[0]


def both(case: tuple, layout: torch.memory_format) -> list[tuple[Tensor, Tensor, Tensor, Tensor, tuple]]:
    """Of fprop and dgrad: ours, stock's, and the input, the filters and the padding of that convolution."""
    x, w, dy = operands(case, layout)
    padding = case[2]
    turned = w.transpose(0, 1).flip(2, 3)
    return [
        (fprop(x, w, padding), F.conv2d(x, w, padding=padding), x, w, padding),
        (
            dgrad(dy, w, x.shape, padding),
            stock_dgrad(dy, w, x.shape, padding),
            dy,
            turned,
            tuple(2 - side for side in padding),
        ),
    ]


def is_direct(case: tuple, layout: torch.memory_format) -> list[bool]:
    """Of fprop and dgrad: sums of random numbers are equal to the bit only if they are made in the same way."""
    return [torch.equal(ours, stock) for ours, stock, *_ in both(case, layout)]


def majorant(x: Tensor, w: Tensor, padding: tuple) -> Tensor:
    """The sums that the transforms make, of absolute values: what their roundings are relative to."""
    b = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1.0]]).abs().double()
    g = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2.0]]).abs().double()
    a = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1.0]]).abs().double()
    x, w = x.double().abs(), w.double().abs()
    p, q = (x.shape[2 + i] + 2 * padding[i] - 2 for i in (0, 1))
    top, left = padding
    x = F.pad(x, (left, left + q % 2, top, top + p % 2))
    tiles = x.unfold(2, 4, 2).unfold(3, 4, 2)
    v = torch.einsum("ia,nchwab,jb->nchwij", b, tiles, b)
    u = torch.einsum("ia,kcab,jb->kcij", g, w, g)
    y = torch.einsum("ai,nkhwij,bj->nkhawb", a, torch.einsum("nchwij,kcij->nkhwij", v, u), a) / 4
    return y.flatten(4).flatten(2, 3)[:, :, :p, :q]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_used(case: tuple, layout: torch.memory_format) -> None:
    assert is_direct(case, layout) == [False, False]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_are_exact(case: tuple, layout: torch.memory_format) -> None:
    x, w, dy = operands(case, layout, integers=True)
    padding, k = list(case[2]), w.shape[0]
    shift, var = torch.arange(k) % 7 - 3.5, torch.tensor([0.25, 1, 4, 1]).repeat(k // 4)
    gamma, mean = torch.tensor([1.0, 2, -1, 3]).repeat(k // 4), (torch.arange(k) % 3).float()
    residual = torch.randint_like(dy, -4, 5)
    norm = {"norm_weight": gamma, "norm_bias": shift, "running_mean": mean, "running_var": var}
    x.requires_grad_()
    y, bits = ops.frozen_conv2d(x, w, None, residual, "relu", [1, 1], padding, **norm, keep_mask=True)
    wide = x.detach().double().requires_grad_()
    conv = F.conv2d(wide, w.double(), padding=padding)
    by_channel = [vector.double()[:, None, None] for vector in (mean, var.sqrt(), gamma, shift)]  # an eps of 0
    exact = ((conv - by_channel[0]) / by_channel[1] * by_channel[2] + by_channel[3] + residual).relu()
    assert torch.equal(y.double(), exact)
    assert y.is_contiguous(memory_format=layout)
    in_order = exact.permute(0, 2, 3, 1) if layout == torch.channels_last else exact
    kept = (in_order.flatten() > 0).long()
    assert torch.equal((bits[:, None].long() >> torch.arange(32) & 1).flatten()[: kept.numel()], kept)
    (dx,), (expected,) = (torch.autograd.grad(of, at, dy.to(of.dtype)) for of, at in ((y, x), (exact, wide)))
    assert torch.equal(dx.double(), expected)
    assert dx.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_within_the_bound(case: tuple, layout: torch.memory_format) -> None:
    """C + 10 roundings at most: 2 where the input is transformed, 4 the filters, 4 the result, and C of the sum."""
    for ours, stock, x, w, padding in both(case, layout):
        channels = x.shape[1]
        exact = F.conv2d(F.pad(x.double(), (padding[1],) * 2 + (padding[0],) * 2), w.double())
        error = (ours - exact).abs()
        assert bool((error <= (channels + 10) * U / (1 - (channels + 10) * U) * majorant(x, w, padding)).all())
        # Of random numbers nothing near that is left, and it is of the size of oneDNN's own.
        size = F.conv2d(F.pad(x.double().abs(), (padding[1],) * 2 + (padding[0],) * 2), w.double().abs())
        inner = (..., slice(2, -2), slice(2, -2))
        assert float((error / size)[inner].max()) < 8 * U
        assert float(error.square().mean()) < 16 * float((stock - exact).square().mean())


def test_nothing_small_is_lost_in_the_filters() -> None:
    """Of subnormal weights no bit is: only products by what is large make anything of them."""
    x, w, _ = operands(CASES[0], torch.channels_last, integers=True)
    x, w = x * 2.0**100, w * 2.0**-149
    assert torch.equal(fprop(x, w, (1, 1)).double(), F.conv2d(x.double(), w.double(), padding=1))


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("value", [INF, -INF, NAN, 3e38], ids=str)
@pytest.mark.parametrize("place", ["x", "w", "padding"])
def test_what_is_not_finite_is_computed_directly(place: str, value: float, layout: torch.memory_format) -> None:
    for case in CASES:
        x, w, dy = operands(case, layout)
        if place == "w":  # 3e38 overflows where filters are transformed
            w[5, 7, 1, 1] = value
        elif place == "x":  # ... and where the input is
            x[-1, 3, 11, 10] = x[-1, 3, 11, 12] = dy[-1, 3, 11, 10] = value
            x[-1, 3, 13, 12] = dy[-1, 3, 11, 12] = dy[-1, 3, 13, 12] = -value
        else:  # in the last row and column, which a tile may hold that ends inside the result
            x[0, 0, -1, -1] = dy[0, 0, -1, -1] = value
            x[0, 0, -3, -1] = dy[0, 0, -3, -1] = -value
        torch.testing.assert_close(
            fprop(x, w, case[2]), F.conv2d(x, w, padding=case[2]), rtol=0, atol=0, equal_nan=True
        )
        dx, expected = dgrad(dy, w, x.shape, case[2]), stock_dgrad(dy, w, x.shape, case[2])
        torch.testing.assert_close(dx, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_result_reads_its_window_alone(case: tuple, layout: torch.memory_format) -> None:
    """So what reads zeros is 0, whatever is beside them, and a gradient ends where the receptive field does."""
    x, w, dy = operands(case, layout)
    for tensor in (x, dy):
        keep = torch.zeros(tensor.shape[0], 1, *tensor.shape[2:])
        for at in ((0, 0, 0), (-1, 9, 10), (-1, 12, -1), (0, -1, -1)):
            keep[at[0], :, at[1], at[2]] = 1
        tensor.mul_(keep)
    reached = lambda of, padding: F.conv2d(of.double().abs(), w.double().abs(), padding=padding) > 0  # noqa: E731
    y = fprop(x, w, case[2])
    assert torch.equal(y != 0, reached(x, case[2]))
    wide = stock_dgrad(dy.double().abs(), w.double().abs(), x.shape, case[2]) > 0
    assert torch.equal(dgrad(dy, w, x.shape, case[2]) != 0, wide)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("activation", "end"), [("relu", 0.0), ("relu6", 0.0), ("relu6", 6.0)])
def test_where_an_activation_bends_zeros_are_exact(activation: str, end: float, layout: torch.memory_format) -> None:
    """Results of exactly 0, whose gradient a rounding error would decide."""
    x, w, _ = operands(CASES[0], layout)
    shift = torch.ones(64)
    at_end = shift.clone()
    at_end[17] = end
    act = F.relu if activation == "relu" else F.relu6
    direct = F.conv2d(x, w, padding=1)
    assert torch.equal(fprop(x, w, (1, 1), activation, at_end), act(direct + at_end.view(1, -1, 1, 1)))
    assert not torch.equal(fprop(x, w, (1, 1), activation, shift), act(direct + 1))


def blur(w: Tensor) -> None:
    w[:, :, ::2, ::2] = 0


def causal(w: Tensor) -> None:
    w[:, :, 1, 1:] = w[:, :, 2] = 0


def blind_spot(w: Tensor) -> None:
    w[:, :, 1, 1] = 0


def pruned(w: Tensor) -> None:
    w[torch.rand_like(w) < 0.2] = 0


def masked_in_half(w: Tensor) -> None:
    w[:, ::2, 1, 1] = 0


def nearly_identity(w: Tensor) -> None:
    w.copy_(nn.init.dirac_(w.clone()) + 1e-6 * w)


def narrow(w: Tensor) -> None:
    """A Gaussian: what is blurred by it is positive where direct convolution is."""
    g = torch.tensor([4e-6, 1, 4e-6])
    w.copy_(g[:, None] * g * (1 + torch.rand_like(w)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "zeros", [nn.init.dirac_, blur, causal, blind_spot, pruned, masked_in_half, nearly_identity, narrow]
)
@pytest.mark.parametrize("alone", [False, True])
def test_filters_that_lean_on_some_weights_are_direct(zeros: Any, layout: torch.memory_format, alone: bool) -> None:
    """What they leave out has no part in a result, whatever reads it, exact zeros stay exact, and what is tiny tiny."""
    for case in CASES[:3]:
        x, dense, dy = operands(case, layout)
        for of_dgrad in (False, True):
            w = dense.clone()
            zeros(w)
            if alone:  # in one channel of the result
                others = torch.arange(w.shape[int(of_dgrad)]) != 40
                w[(slice(None), others) if of_dgrad else others] = dense[(slice(None), others) if of_dgrad else others]
            if of_dgrad:
                assert torch.equal(dgrad(dy, w, x.shape, case[2]), stock_dgrad(dy, w, x.shape, case[2]))
            else:
                assert torch.equal(fprop(x, w, case[2]), F.conv2d(x, w, padding=case[2]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_zeros_by_chance_change_nothing(layout: torch.memory_format) -> None:
    """So do channels that are cut off: of what all nine weights are 0 for nothing is left."""
    x, w, dy = operands(CASES[0], layout)
    w[3, 4, 1, 1] = w[5, 4, 0, 2] = 0
    w[7], w[:, 9] = 0, 0
    assert not torch.equal(fprop(x, w, (1, 1)), F.conv2d(x, w, padding=1))
    assert not torch.equal(dgrad(dy, w, x.shape, (1, 1)), stock_dgrad(dy, w, x.shape, (1, 1)))
    assert float(fprop(x, w, (1, 1))[:, 7].abs().max()) == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_activation_behind_a_block_sees_exact_zeros(layout: torch.memory_format) -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight)
    stock = nn.Sequential(conv, nn.BatchNorm2d(64), nn.LeakyReLU(0.1)).eval().requires_grad_(False)
    x = laid_out(torch.randn(1, 64, 40, 40).relu(), layout).requires_grad_()
    (ours,), (expected,) = (torch.autograd.grad(net(x).sum(), x) for net in (fuse(copy.deepcopy(stock)), stock))
    torch.testing.assert_close(ours, expected)


def test_by_sizes_others_are_left_to_torch() -> None:
    last, first = torch.channels_last, torch.contiguous_format
    for case in (((8, 64, 11, 11), 64, (1, 1)), ((1, 64, 14, 16), 64, (1, 1)), ((2, 48, 28, 28), 64, (1, 1))):
        assert is_direct(case, last) == [True, True]
    assert is_direct(((1, 256, 16, 16), 256, (1, 1)), last) == [True, True]
    assert is_direct(((2, 32, 12, 12), 32, (1, 1)), last) == [False, False]
    assert is_direct(((8, 64, 27, 27), 64, (1, 1)), first) == [True, True]
    assert is_direct(((2, 64, 40, 40), 32, (1, 1)), first) == [True, USES == "AVX2"]
    x, w, _ = operands(CASES[0], last)
    for wide in (torch.float64, torch.bfloat16):
        a, b = x.to(wide), w.to(wide)
        assert torch.equal(fprop(a, b, (1, 1)), F.conv2d(a, b, padding=1))
    with torch.no_grad():  # no block: torch's own
        assert torch.equal(ops.frozen_conv2d(x, w, None, None, "none", [1, 1], [1, 1])[0], F.conv2d(x, w, padding=1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_depend_on_nothing_else(case: tuple) -> None:
    """Not on the number of threads, the layout, the strides or the place in a batch."""
    results, before = [], torch.get_num_threads()
    try:
        for layout in LAYOUTS:
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                x, w, dy = operands(case, layout)
                results.append((fprop(x, w, case[2]), dgrad(dy, w, x.shape, case[2])))
    finally:
        torch.set_num_threads(before)
    x, w, dy = operands(case, LAYOUTS[0])
    sliced = torch.empty(*x.shape[:3], x.shape[3] + 3)[..., 1:-2].copy_(x)
    results.append((fprop(sliced, w, case[2]), dgrad(dy.contiguous(), w, x.shape, case[2])))
    turned = laid_out(x.flip(0), LAYOUTS[0]), laid_out(dy.flip(0), LAYOUTS[0])
    results.append((fprop(turned[0], w, case[2]).flip(0), dgrad(turned[1], w, x.shape, case[2]).flip(0)))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(2):
        norm = nn.BatchNorm2d(64)
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), norm, nn.ReLU()]
    stock = nn.Sequential(*layers, nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()).eval().requires_grad_(False)
    return stock, fuse(copy.deepcopy(stock))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_networks_and_gradients_of_gradients(layout: torch.memory_format) -> None:
    stock, fused = nets()
    x = laid_out(torch.randn(2, 64, 28, 28), layout)
    results = []
    for net in (stock, fused):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(dx.square().sum(), leaf)
        (plain,) = torch.autograd.grad(net(leaf).square().sum(), leaf)
        results.append([y, dx, second, plain])
    for a, b in zip(*([t.detach() for t in result] for result in results), strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-4
    leaf = x.clone().requires_grad_()
    assert bytes_kept(fused, leaf) < bytes_kept(stock, leaf) / 16


def test_weights_are_live() -> None:
    stock, fused = nets()
    x = torch.randn(2, 64, 28, 28)
    before = fused(x)
    for net in (stock, fused):
        net[0].weight.data.mul_(-0.5)  # type: ignore[operator, union-attr]
        net[3].weight.numpy()[:] += 0.01  # type: ignore[operator, union-attr]
    after = fused(x)
    assert float((after - stock(x)).norm() / after.norm()) < 1e-5
    assert float((after - before).norm() / after.norm()) > 0.1
