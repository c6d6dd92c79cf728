"""Activations and dropout: torch's values and gradients, one bit per element kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck

import freezekit as fk
import freezekit.functional as ff
from tests.observe import bytes_kept

Function = Callable[..., Tensor]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 6.0, 0.1, -0.1]

# name -> (freezekit's, torch's, arguments)
FUNCTIONS: dict[str, tuple[Function, Function, tuple[float, ...]]] = {
    "relu": (ff.relu, F.relu, ()),
    "relu6": (ff.relu6, F.relu6, ()),
    "hardtanh": (ff.hardtanh, F.hardtanh, (-0.1, 0.1)),
    "leaky_relu": (ff.leaky_relu, F.leaky_relu, (0.3,)),
    "leaky_relu0": (ff.leaky_relu, F.leaky_relu, (0.0,)),
    "dropout": (ff.dropout, F.dropout, (0.3,)),
    "dropout.77": (ff.dropout, F.dropout, (0.77,)),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x,
    "nhwc": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1),
    "gaps": lambda x: x[:, :, ::2, 1:],
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
}


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))


def results(function: Function, x: Tensor, *arguments: float, inplace: bool = False) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    leaf = x.detach().requires_grad_()
    y = function(leaf * 1 if inplace else leaf, *arguments, **({"inplace": True} if inplace else {}))
    g = torch.empty_like(y).copy_(torch.randn(y.shape, dtype=torch.float64))
    g[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return y.detach(), grad(y, leaf, g)[0]


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_torch_s_to_the_bit(name: str, dtype: torch.dtype, layout: str, inplace: bool) -> None:
    ours, stock, arguments = FUNCTIONS[name]
    x = torch.randn(4, 6, 8, 10).to(dtype)
    # torch's hardtanh gives NaN a gradient or not, depending on where in the tensor it stands.
    stray = torch.tensor(SPECIAL)
    x[0, 0, 0, :8] = stray.nan_to_num(1.0) if name in ("relu6", "hardtanh") else stray
    x = LAYOUTS[layout](x)
    actual, expected = results(ours, x, *arguments, inplace=inplace), results(stock, x, *arguments, inplace=inplace)
    assert equal(actual[0], expected[0])
    if inplace and name == "hardtanh":
        # torch compares the rounded result with unrounded ends, so that in place half types pass at the ends.
        expected = results(stock, x, *arguments)
    assert equal(actual[1], expected[1])
    if not inplace:
        assert actual[0].stride() == expected[0].stride()
        assert actual[1].stride() == expected[1].stride()


@pytest.mark.parametrize(
    "size", [(0,), (1,), (31,), (32,), (33,), (0, 3, 2, 2), (3, 5, 7), (40000,), (2, 70001)], ids=str
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_size(name: str, size: tuple[int, ...]) -> None:
    ours, stock, arguments = FUNCTIONS[name]
    x = torch.randn(size)

    def run(f: Function) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()
        y = f(leaf, *arguments)
        return y, grad(y.sum(), leaf)[0]

    assert all(torch.equal(a, b) for a, b in zip(run(ours), run(stock), strict=True))


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_bit_per_element_is_kept(name: str, inplace: bool) -> None:
    ours, _, arguments = FUNCTIONS[name]
    x = torch.randn(8, 3, 16, 16, requires_grad=True)
    kept = bytes_kept(lambda t: ours(t, *arguments, inplace=inplace), x)
    assert kept == x.numel() // 8
    assert bytes_kept(lambda t: ours(t, *arguments, inplace=inplace), x.detach()) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slopes", ["one", "one per channel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prelu_with_a_frozen_slope_is_torch_s_to_the_bit(dtype: torch.dtype, slopes: str, layout: str) -> None:
    x = torch.randn(4, 6, 8, 10).to(dtype)
    x[0, 0, 0, :8] = torch.tensor(SPECIAL)
    x = LAYOUTS[layout](x)
    slope = torch.linspace(-0.25, 0.5, x.shape[1] if slopes != "one" else 1).to(dtype)
    actual, expected = results(ff.prelu, x, slope), results(F.prelu, x, slope)  # type: ignore[arg-type]
    for ours, stock in zip(actual, expected, strict=True):
        assert equal(ours, stock)
        assert ours.stride() == stock.stride()


@pytest.mark.parametrize("slope", [[0.3], [0.1, -0.2, 0.3], [float("inf"), float("nan"), 0.0]], ids=str)
def test_prelu_of_every_shape_order_and_slope(slope: list[float]) -> None:
    weight = torch.tensor(slope, dtype=torch.float64)
    for size in ((2, 3), (2, 3, 5), (2, 3, 1, 2, 70)):
        x = torch.randn(size, dtype=torch.float64)
        for ours, stock in zip(results_of(ff.prelu, x, weight), results_of(F.prelu, x, weight), strict=True):
            assert equal(ours, stock)
    if weight.isfinite().all():
        small = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda t: ff.prelu(t * t * t, weight), small)
        assert gradgradcheck(lambda t: ff.prelu(t * t * t, weight), small)
    if len(slope) == 1:
        for scalar in (torch.tensor(-2.0), torch.tensor([-2.0, 1.0])):
            learns = scalar.double().requires_grad_()
            assert torch.equal(ff.prelu(learns, weight), F.prelu(learns, weight))


def results_of(function: Function, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf, weight)
    return y.detach(), grad(y, leaf, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))[0]


def test_prelu_keeps_one_bit_per_element_while_its_slope_is_frozen() -> None:
    x, slope = torch.randn(8, 3, 16, 16, requires_grad=True), torch.full((3,), 0.25)
    there_anyway = slope.untyped_storage().nbytes()
    for frozen in (slope, slope[:1]):
        assert bytes_kept(lambda t, s=frozen: ff.prelu(t, s), x) == x.numel() // 8 + there_anyway
        assert ff.prelu(x, frozen).grad_fn.name() == "FreezekitPReLUBackward"
    assert bytes_kept(lambda t: ff.prelu(t, slope), x.detach()) == there_anyway
    learns = slope.clone().requires_grad_()
    assert ff.prelu(x, learns).grad_fn.name() == F.prelu(x, learns).grad_fn.name()


def test_prelu_leaves_to_torch_what_it_refuses_and_sees_writes_to_its_slope() -> None:
    x, slope = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([0.5])
    for wrong in (torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(1, 1)):
        with pytest.raises(RuntimeError) as theirs:
            F.prelu(x, wrong)
        with pytest.raises(RuntimeError) as ours:
            ff.prelu(x, wrong)
        assert str(ours.value) == str(theirs.value)
    y = ff.prelu(x, slope)
    slope.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert torch.equal(ff.prelu(x, slope), F.prelu(x, slope))


def test_prelu_under_autocast_transforms_and_on_meta() -> None:
    x, t, slope = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.tensor([0.5, -0.5])
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ys = [f(leaf, slope) for f in (ff.prelu, F.prelu)]
    assert ys[0].dtype == ys[1].dtype
    assert torch.equal(*ys)
    assert torch.equal(*(grad(y.float().sum(), leaf)[0] for y in ys))
    jvps = [torch.func.jvp(lambda v, f=f: f(v, slope), (x,), (t,))[1] for f in (ff.prelu, F.prelu)]
    assert torch.equal(*jvps)
    mapped = [torch.func.vmap(lambda v, f=f: f(v, slope))(x.view(3, 1, 2, 8)) for f in (ff.prelu, F.prelu)]
    assert torch.equal(*mapped)
    cotangents = torch.randn(5, 3, 2, 8)
    batched = [grad(f(leaf, slope), leaf, cotangents, is_grads_batched=True)[0] for f in (ff.prelu, F.prelu)]
    assert torch.equal(*batched)
    meta = torch.empty(2, 3, device="meta", requires_grad=True)
    y = ff.prelu(meta, torch.empty(1, device="meta"))
    assert grad(y.sum(), meta)[0].shape == (2, 3)


@pytest.mark.parametrize("slopes", [1, 3])
@pytest.mark.parametrize("learns", [False, True])
def test_prelu_opcheck(learns: bool, slopes: int) -> None:
    x = torch.randn(2, 3, 4, 5, requires_grad=learns)
    torch.library.opcheck(torch.ops.freezekit.prelu, (x, torch.full((slopes,), 0.25)))


def test_the_gradient_at_zero_is_zero() -> None:
    x = torch.tensor([0.0, -0.0], requires_grad=True)
    assert grad(ff.relu(x).sum(), x)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["leaky_relu", "hardtanh"])
@pytest.mark.parametrize("number", [7e4, 1e39])
def test_numbers_out_of_range_are_torch_s_errors(dtype: torch.dtype, number: float, name: str, inplace: bool) -> None:
    numbers = (number,) if name == "leaky_relu" else (-number, number)

    def outcome(functions: Any) -> Any:
        try:
            x = torch.randn(4, 8).to(dtype).requires_grad_() * 1
            return getattr(functions, name)(x, *numbers, inplace=inplace).dtype
        except RuntimeError as error:
            return str(error).splitlines()[0]

    expected = outcome(F)
    assert outcome(ff) == expected
    with fk.enabled():
        assert outcome(F) == expected


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "leaky_relu"])
def test_derivatives_of_every_order(name: str) -> None:
    ours, _, arguments = FUNCTIONS[name]
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    x[x.abs() < 0.02] = 0.5
    x = x.requires_grad_()

    def f(t: Tensor) -> Tensor:
        return ours(t * t * t, *arguments)

    assert gradcheck(f, x)
    assert gradgradcheck(f, x)


def test_derivatives_of_dropout() -> None:
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def f(t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ff.dropout(t * t, 0.4)

    assert gradcheck(f, x)
    assert gradgradcheck(f, x)


@pytest.mark.parametrize("name", ["relu", "hardtanh", "leaky_relu", "dropout"])
def test_in_place_on_a_view_of_something_that_needs_a_gradient(name: str) -> None:
    ours, stock, arguments = FUNCTIONS[name]

    def run(f: Function) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        leaf = torch.linspace(-2, 2, 40).view(4, 10).requires_grad_()
        base = leaf * 1
        f(base[:, 2:7], *arguments, inplace=True)
        return base.detach(), grad((base * base).sum(), leaf)[0]

    assert all(torch.equal(a, b) for a, b in zip(run(ours), run(stock), strict=True))


@pytest.mark.parametrize("slope", [-0.1, float("nan"), -0.0, 0.1])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("way", ["converted", "function", "named", "enabled"])
def test_leaky_relu_of_any_slope_has_the_gradient_that_torch_gives_or_refuses(
    way: str, inplace: bool, slope: float
) -> None:
    def run(f: Callable[[Tensor], Tensor]) -> Tensor | str:
        x = torch.linspace(-2, 2, 40).requires_grad_()
        try:
            return grad(f(x * 1).sum(), x)[0]
        except RuntimeError as error:
            return str(error).partition("\n")[0]

    stock = nn.LeakyReLU(slope, inplace)
    ours: dict[str, Callable[[Tensor], Tensor]] = {
        "converted": fk.convert(nn.LeakyReLU(slope, inplace)),
        "function": lambda x: ff.leaky_relu(x, slope, inplace),
        "named": lambda x: ff.leaky_relu(x, negative_slope=slope, inplace=inplace),
        "enabled": fk.enabled()(stock.forward),
    }
    expected, got = run(stock), run(ours[way])
    assert isinstance(expected, str) == (inplace and not slope >= 0)
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert got == expected


def test_in_place_edits_are_seen() -> None:
    x = torch.randn(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        ff.relu(x, inplace=True)
    y = x * 1
    z = y * y  # keeps y
    ff.relu(y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_dropout_leaves_the_generator_as_torch_does() -> None:
    for p in (0.0, 0.3, 1.0):
        after = []
        for f in (ff.dropout, F.dropout):
            torch.manual_seed(5)
            f(torch.ones(100, requires_grad=True), p)
            after.append(torch.rand(3))
        assert torch.equal(*after)


def test_no_gradient_no_bits_and_integers_as_in_torch() -> None:
    x = torch.arange(-3, 4)
    assert torch.equal(ff.relu(x), F.relu(x))
    assert ff.dropout(x.float(), training=False).data_ptr() != 0
    with torch.no_grad():
        assert ff.relu(torch.ones(3, requires_grad=True)).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(ff.relu(torch.tensor([-1.0, 1.0]), inplace=True), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "leaky_relu"])
def test_transforms_and_forward_mode(name: str) -> None:
    ours, stock, arguments = FUNCTIONS[name]
    x, t = torch.randn(3, 8), torch.randn(3, 8)

    def f(v: Tensor) -> Tensor:
        return ours(v, *arguments)

    def g(v: Tensor) -> Tensor:
        return stock(v, *arguments)

    assert torch.equal(torch.func.vmap(f)(x), torch.func.vmap(g)(x))
    assert torch.equal(torch.func.grad(lambda v: f(v).sum())(x), torch.func.grad(lambda v: g(v).sum())(x))
    assert torch.equal(torch.func.jvp(f, (x,), (t,))[1], torch.func.jvp(g, (x,), (t,))[1])
    assert torch.equal(torch.func.jacrev(f)(x), torch.func.jacrev(g)(x))
    leaf = x.requires_grad_()
    cotangents = torch.randn(5, 3, 8)
    ys = [(ours(leaf, *arguments)), stock(leaf, *arguments)]
    a, b = (grad(y, leaf, cotangents, is_grads_batched=True)[0] for y in ys)
    assert torch.equal(a, b)


def test_meta_and_wrong_arguments() -> None:
    y = ff.relu(torch.empty(3, 4, device="meta", requires_grad=True))
    assert y.is_meta
    assert grad(y.sum(), y)[0].shape == (3, 4)
    with pytest.raises(ValueError, match="min_val cannot be greater than max_val"):
        ff.hardtanh(torch.ones(1), 2, 1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        ff.dropout(torch.ones(1), 1.5)
    with pytest.raises(ValueError, match="kind must be"):
        torch.ops.freezekit.activation(torch.ones(1), "gelu")
    bits = torch.ops.freezekit.activation_bits(torch.ones(40), "relu")[1]
    assert bits.tolist() == [-1, 255]
    with pytest.raises(RuntimeError, match="2 words for 40 elements, got 1"):
        torch.ops.freezekit.gate(torch.ones(40), bits[:1], [1])
    with pytest.raises(RuntimeError, match="dense tensor"):
        torch.ops.freezekit.gate(torch.ones(40), bits, [2])


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "gaps"])
@pytest.mark.parametrize("learns", [False, True])
def test_opcheck(learns: bool, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5)).detach().requires_grad_(learns)
    ops = torch.ops.freezekit
    torch.library.opcheck(ops.activation, (x, "leaky_relu", 0.1))
    torch.library.opcheck(ops.activation_bits, (x.detach(), "hardtanh", -0.5, 0.5))
    torch.library.opcheck(ops.activation_bits_, (x.detach().clone(), "relu"))
    dense = x.detach().clone()
    bits = ops.activation_bits(dense, "relu")[1]
    torch.library.opcheck(ops.gate, (dense.requires_grad_(learns), bits, dense.stride(), 1.0, 0.5))


def test_a_slope_whose_sign_is_not_in_memory() -> None:
    slope = torch.complex(torch.zeros(1), torch.full((1,), -0.25)).conj().imag
    assert slope.is_neg()
    x = torch.tensor([-4.0, 2.0], requires_grad=True)
    y = ff.prelu(x, slope)
    expected = F.prelu(x, slope)
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
