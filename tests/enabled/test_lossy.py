"""`enable(precision=)`: derivatives in few bits, within their bound, where that saves and nowhere else."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from freezekit.enabling import precision
from tests.observe import MACHINE, bytes_saved
from tests.smooth import SMOOTH

Call = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Call] = {
    **SMOOTH,
    "softplus, beta 3": lambda x: F.softplus(x, 3.0, 5.0),
    "elu": F.elu,
    "elu, alpha 0.3": lambda x: F.elu(x, 0.3),
    "elu, alpha 2": lambda x: F.elu(x, 2.0),
    "selu": F.selu,
}
INPLACE: dict[str, Call] = {
    "silu": lambda x: F.silu(x, inplace=True),
    "mish": lambda x: F.mish(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "gelu": torch.ops.aten.gelu_,
}
# As docs/enable.md has them: how far a gradient may be from stock's, in units of the incoming one.
BOUNDS = {
    "silu": (1 / 424, 1 / 24),
    "gelu": (1 / 404, 1 / 22),
    "gelu_tanh": (1 / 404, 1 / 22),
    "mish": (1 / 422, 1 / 24),
    "hardswish": (1 / 254, 1 / 14),
    "softplus": (1 / 508, 1 / 28),
    "softplus, beta 3": (1 / 508, 1 / 28),
    "elu": (1 / 508, 1 / 28),
    "elu, alpha 0.3": (1 / 508, 1 / 28),
    "elu, alpha 2": (1 / 254, 1 / 14),
    "selu": (1.0507009873554805 / 302, 1.0507009873554805 / 16),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRECISIONS = ["int8", "int4"]
LOSSY = "FreezekitLossyActivationBackward"
ENOUGH = 4096


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    assert not fk.is_enabled()
    yield
    assert not fk.is_enabled()
    assert precision() is None


def gradient(call: Call, x: Tensor, dy: Tensor | None = None, asked: str | None = None) -> tuple[Tensor, Tensor]:
    """Result and gradient of call(x), x no leaf, stock or enabled with a precision."""
    leaf = x.detach().requires_grad_()
    if asked:
        with fk.enabled(asked):
            y = call(leaf * 1)
    else:
        y = call(leaf * 1)
    return y.detach(), torch.autograd.grad(y, leaf, torch.ones_like(y) if dy is None else dy)[0]


def assert_within(found: Tensor, stock: Tensor, dy: Tensor, bound: float) -> None:
    """By the bound, and a rounding of the result's dtype each way. NaN is where stock has one, or x is one."""
    ok = ~stock.isnan() & ~found.isnan()
    eps = torch.finfo(stock.dtype).eps
    far = (found.double() - stock.double()).abs()
    most = (bound + 4e-6) * dy.double().abs() + eps * stock.double().abs() + torch.finfo(stock.dtype).tiny
    if stock.dtype == torch.float16:
        most = most + 2**-24
    assert bool((far <= most)[ok].all()), ((far - most)[ok].max(), bound)
    assert bool((found.isnan() | ~stock.isnan()).all())


def every_16_bit_number(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def values(dtype: torch.dtype) -> Tensor:
    """All there are, of 16 bits; else a dense sweep, and numbers of every size."""
    if dtype != torch.float32:
        return every_16_bit_number(dtype)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(4096, generator=generator) * 10 ** torch.linspace(-40, 38, 4096)
    special = [0.0, -0.0, 3.0, -3.0, math.inf, -math.inf, math.nan, -math.nan, 2e19, -2e19, 1e19, 3.4e38, -3.4e38]
    return torch.cat([torch.linspace(-15, 15, 100_000), sizes, torch.tensor(special)])


@pytest.mark.parametrize("asked", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_are_within_their_bound(name: str, dtype: torch.dtype, asked: str) -> None:
    call, x = ACTIVATIONS[name], values(dtype)
    dy = (torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    y, stock = gradient(call, x, dy)
    result, found = gradient(call, x, dy, asked)
    torch.testing.assert_close(result, y, rtol=0, atol=0, equal_nan=True)
    assert_within(found, stock, dy, BOUNDS[name][PRECISIONS.index(asked)])
    assert bool(found.isnan()[x.isnan()].all())
    assert bool((stock.isnan() | x.isnan())[found.isnan()].all())


@pytest.mark.parametrize("asked", PRECISIONS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_bound_is_no_wider_than_it_must_be(name: str, asked: str) -> None:
    x = torch.linspace(-15, 15, 200_000)
    far = (gradient(ACTIVATIONS[name], x, asked=asked)[1] - gradient(ACTIVATIONS[name], x)[1]).abs().max().item()
    bound = BOUNDS[name][PRECISIONS.index(asked)]
    assert 0.95 * bound <= far <= bound + 4e-6


@pytest.mark.parametrize("asked", PRECISIONS)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "mish", "hardswish", "softplus", "selu"])
def test_flat_and_straight_parts_are_exact(name: str, asked: str) -> None:
    x = torch.cat([torch.linspace(20, 1e6, ENOUGH), torch.linspace(-1e6, -200, ENOUGH)])
    assert torch.equal(gradient(ACTIVATIONS[name], x, asked=asked)[1].abs(), gradient(ACTIVATIONS[name], x)[1].abs())


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(ACTIVATIONS)),
    asked=st.sampled_from(PRECISIONS),
    dtype=st.sampled_from(DTYPES),
    size=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 4.0, 50.0, 1e4]),
    layout=st.sampled_from(["plain", "transposed", "channels last", "dy strided", "dy expanded"]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 10**6),
)
def test_any_size_and_layout(
    name: str,
    asked: str,
    dtype: torch.dtype,
    size: list[int],
    scale: float,
    layout: str,
    threads: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(size, generator=generator) * scale).to(dtype)
    dy = torch.randn(size, generator=generator).to(dtype)
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "dy strided":
        dy = torch.stack([dy, dy], -1)[..., 0]
    if layout == "dy expanded":
        dy = dy[..., :1].expand(size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, stock = gradient(ACTIVATIONS[name], x, dy)
        result, found = gradient(ACTIVATIONS[name], x, dy, asked)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(result, y)
    assert result.stride() == y.stride()
    assert found.stride() == stock.stride()
    assert_within(found, stock, dy, BOUNDS[name][PRECISIONS.index(asked)])


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: (lambda x, other, call=call: call(x)) for name, call in ACTIVATIONS.items()},  # type: ignore[misc]
    "silu, in place": lambda x, other: F.silu(x + 0, inplace=True),
    "gelu, in place, of a view": lambda x, other: torch.ops.aten.gelu_((x + 0).view(-1)).view_as(x),
    "product": lambda x, other: x * other,
    "product, other first": lambda x, other: other * x.sigmoid(),
    "square": lambda x, other: x.square(),
    "power": lambda x, other: (x / 4) ** 2,
    "sum": lambda x, other: x + other,
    "half": lambda x, other: torch.cat(x.chunk(2, -1), -1) / 2,
    "transposed": lambda x, other: x.t().contiguous().t(),
    "norm": lambda x, other: F.layer_norm(x, x.shape[-1:]),
    "group norm": lambda x, other: F.group_norm(x.view(4, 8, -1), 4).view_as(x),
    "detached product": lambda x, other: x * other.detach(),
}


@settings(max_examples=120, deadline=None)
@given(
    names=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 8)), min_size=1, max_size=9),
    asked=st.sampled_from(PRECISIONS),
    retain=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_graph(names: list[tuple[str, int]], asked: str, retain: bool, seed: int) -> None:
    """Results are stock's to the bit; gradients are near, and the more bits the nearer."""
    start = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))

    def run(precision: str | None) -> tuple[Tensor, Tensor]:
        leaf = start.clone().requires_grad_()
        with fk.enabled(precision):
            made = [leaf * 1]
            for name, which in names:
                made.append(F.layer_norm(STEPS[name](made[-1], made[which % len(made)]), (64,)))
            y = sum(made, torch.zeros(()))
        if retain:
            torch.autograd.grad(y.sum(), leaf, retain_graph=True)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
        return y.detach(), torch.autograd.grad(y, leaf, dy)[0]

    (exact_y, exact), (y, found) = run(None), run(asked)
    assert torch.equal(y, exact_y)
    assert found.isfinite().all()
    assert (found - exact).norm() <= (0.02 if asked == "int8" else 0.35) * exact.norm() + 1e-6


# What is kept.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_byte_or_half_of_one_is_kept(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(ENOUGH + 1, dtype=dtype, requires_grad=True)
    for asked, nbytes in (("int8", ENOUGH + 1), ("int4", ENOUGH // 2 + 1)):
        with fk.enabled(asked):
            assert bytes_saved(lambda: ACTIVATIONS[name](x * 1)) == nbytes


@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("name", INPLACE)
def test_in_place(name: str, as_view: bool) -> None:
    def call(x: Tensor) -> Tensor:
        INPLACE[name](x.view(-1) if as_view else x)
        return x

    x = torch.randn(64, 64)
    y, stock = gradient(call, x)
    result, found = gradient(call, x, asked="int8")
    assert torch.equal(result, y)
    assert not torch.equal(found, stock)
    assert_within(found, stock, torch.ones_like(stock), BOUNDS[name][0])


def test_in_place_on_what_retains_its_gradient() -> None:
    found = []
    for asked in (None, "int8"):
        leaf = torch.linspace(-4, 4, ENOUGH).requires_grad_()
        with fk.enabled(asked):
            x = leaf * 1
            x.retain_grad()
            F.silu(x, inplace=True)
            (x * x).sum().backward()
        assert x.grad is not None
        found.append((x.grad, leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0.04)


def test_the_input_is_freed() -> None:
    leaf = torch.randn(ENOUGH, requires_grad=True)
    with fk.enabled("int8"):
        x = leaf * 1
        storage = x.untyped_storage()
        y = F.silu(x)
        del x
        assert torch._C._storage_Use_Count(storage._cdata) == 1  # who asks
    assert y.grad_fn is not None


def cases_that_gain_nothing() -> dict[str, Callable[[], Tensor]]:
    leaf = torch.randn(64, 128, requires_grad=True)
    double = torch.randn(64, 128, dtype=torch.float64, requires_grad=True)
    few = torch.randn(1023, requires_grad=True)
    return {
        "a leaf": lambda: F.silu(leaf),
        "float64": lambda: F.silu(double * 1),
        "few elements": lambda: F.silu(few * 1),
        "a part of a tensor": lambda: F.silu((leaf * 1).chunk(2, -1)[0]),
        "with gaps": lambda: F.silu((leaf * 1)[:, ::2]),
        "expanded": lambda: F.silu((leaf * 1)[:1].expand(64, 128)),
        "an odd softplus": lambda: F.softplus(leaf * 1, -1.0),
        "a softplus that may overflow": lambda: F.softplus(leaf * 1, 1.0, 100.0),
        "an odd elu": lambda: F.elu(leaf * 1, 2.01),
        "sigmoid": lambda: torch.sigmoid(leaf * 1),
        "tanh": lambda: torch.tanh(leaf * 1),
    }


@pytest.mark.parametrize("name", cases_that_gain_nothing())
def test_stock_s_node_where_nothing_is_gained(name: str) -> None:
    with fk.enabled("int8"):
        y = cases_that_gain_nothing()[name]()
        assert y.grad_fn is not None
        assert not y.grad_fn.name().startswith("Freezekit")


def test_no_node_where_no_gradient_is_recorded() -> None:
    x = torch.randn(ENOUGH)
    with fk.enabled("int8"):
        assert F.silu(x).grad_fn is None
        with torch.no_grad():
            assert F.silu(x.clone().requires_grad_() * 1).grad_fn is None
        with torch.inference_mode():
            F.silu(x)


def test_behind_a_group_norm_the_exact_chain_stays() -> None:
    norm = nn.GroupNorm(4, 8).requires_grad_(False)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(F.silu(norm(x * 1)).sum(), x)
    with fk.enabled("int8"):
        y = F.silu(norm(x * 1))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda x, gate: F.silu(x) * gate,
    "silu, in place": lambda x, gate: F.silu(x, inplace=True) * gate,
    "on the right": lambda x, gate: gate * F.gelu(x),
    "of two": lambda x, gate: F.silu(x) * F.gelu(gate),
    "with a sum in between": lambda x, gate: F.silu(x) * (gate + torch.ones_like(gate)),
    "squared": lambda x, gate: F.silu(x) ** 2 + gate,
    "mish": lambda x, gate: F.mish(x) * gate,
    "hardswish": lambda x, gate: F.hardswish(x) * gate,
    "elu": lambda x, gate: F.elu(x) * gate,
    "softplus": lambda x, gate: F.softplus(x) * gate,
}


@pytest.mark.parametrize("name", GATED)
def test_what_a_product_reads_is_kept_beside_codes(name: str) -> None:
    leaves = [torch.randn(ENOUGH, requires_grad=True) for _ in range(2)]

    def run(asked: str | None) -> tuple[tuple[Tensor, ...], int]:
        kept: dict[int, int] = {}

        def pack(saved: Tensor) -> Tensor:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with fk.enabled(asked):
            inputs = [leaf * 1 for leaf in leaves]
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
                y = GATED[name](*inputs)
        return torch.autograd.grad(y.sum(), leaves), sum(kept.values())

    (exact, most), (found, kept) = run(None), run("int8")
    assert not torch.equal(found[0], exact[0])
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.1)
    assert kept <= most - 4 * ENOUGH + ENOUGH  # of one activation


# What looks on.


def test_second_derivatives_are_an_error_that_names_the_cure() -> None:
    leaf = torch.randn(ENOUGH, requires_grad=True)
    with fk.enabled("int4"):
        y = F.silu(leaf * 1)
    with pytest.raises(NotImplementedError, match=r"create_graph=True.* 4 bits.*precision=None"):
        torch.autograd.grad(y.sum(), leaf, create_graph=True)
    torch.autograd.grad(y.sum(), leaf)


def test_retain_graph_and_a_freed_one() -> None:
    leaf = torch.randn(ENOUGH, requires_grad=True)
    for gated in (False, True):
        with fk.enabled("int8"):
            y = F.silu(leaf * 1)
            z = (y * (leaf * 1)).sum() if gated else y.sum()
        first = torch.autograd.grad(z, leaf, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(z, leaf)[0])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(z, leaf)


def test_a_write_to_the_input_matters_no_more() -> None:
    leaf = torch.linspace(-3, 3, ENOUGH).requires_grad_()
    _, expected = gradient(F.silu, leaf, asked="int8")
    with fk.enabled("int8"):
        x = leaf * 1
        y = F.silu(x)
        x.data.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], expected)


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32))


def step(model: nn.Module, x: Tensor, asked: str | None, how: Callable[..., Tensor] | None = None) -> Tensor:
    leaf = x.detach().requires_grad_()
    with fk.enabled(asked):
        y = how(model, leaf) if how else model(leaf)
        y.pow(2).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


HOW: dict[str, Callable[..., Tensor]] = {
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "offload": lambda model, x: offloaded(model, x),
}


def offloaded(model: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return model(x)


@pytest.mark.parametrize("asked", PRECISIONS)
@pytest.mark.parametrize("name", HOW)
def test_under_what_moves_saved_tensors(name: str, asked: str) -> None:
    model, x = block().requires_grad_(False), torch.randn(64, 32)
    torch.testing.assert_close(step(model, x, asked, HOW[name]), step(model, x, asked), rtol=1e-5, atol=1e-6)


def test_codes_pass_through_hooks_that_cast_to_bfloat16() -> None:
    leaf = torch.randn(ENOUGH, requires_grad=True)
    for asked in PRECISIONS:
        _, expected = gradient(F.silu, leaf, asked=asked)
        with (
            fk.enabled(asked),
            saved_tensors_hooks(lambda t: (t.dtype, t.bfloat16()), lambda packed: packed[1].to(packed[0])),
        ):
            y = F.silu(leaf * 1)
        assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], expected)


def test_hooks_that_round_codes_are_an_error() -> None:
    leaf = torch.randn(ENOUGH, requires_grad=True)
    with (
        fk.enabled("int8"),
        saved_tensors_hooks(lambda t: t.to(torch.float32).div(3).to(torch.uint8), lambda t: t),
    ):
        y = F.silu(leaf * 1)
    with pytest.raises(RuntimeError, match="saved-tensor hooks must give back the values"):
        y.sum().backward()


def test_autocast() -> None:
    model, x = block().requires_grad_(False), torch.randn(64, 32)

    def under(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    exact, found = step(model, x, None, under), step(model, x, "int8", under)
    assert not torch.equal(exact, found)
    assert ((exact - found).norm() / exact.norm()).item() < 0.02


def test_learning_weights_get_gradients_within_the_bound() -> None:
    x = torch.randn(64, 32)
    grads = []
    for asked in (None, "int8"):
        model = block()
        with fk.enabled(asked):
            model(x).pow(2).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for exact, found in zip(*grads, strict=True):
        assert ((exact - found).norm() / exact.norm()).item() < 0.01


def test_a_compiled_graph_is_exact() -> None:
    """The compiler has the activations: so what it makes is the same whatever the precision."""
    torch._dynamo.reset()
    model, x = block().requires_grad_(False), torch.randn(64, 32)
    exact = step(model, x, None)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    leaf = x.detach().requires_grad_()
    with fk.enabled("int8"):
        compiled(leaf).pow(2).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, exact, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("call", [F.silu, F.mish, F.hardswish])
def test_compiled_autograd(call: Call) -> None:
    """One after the other from one cache: they differ by their codes alone, and by the grid of these."""
    x = torch.randn(64, 64)

    def forward(leaf: Tensor) -> Tensor:
        return (call(leaf * 1) * (leaf * 2)).sum()

    expected = step(nn.Identity(), x, "int8", lambda _, leaf: forward(leaf).sqrt().expand(1))
    leaf = x.clone().requires_grad_()
    with fk.enabled("int8"), torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        forward(leaf).sqrt().expand(1).pow(2).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, expected)


def test_transforms_and_tangents_see_torch_s() -> None:
    x = torch.randn(ENOUGH)
    with fk.enabled("int8"):
        found = torch.func.grad(lambda x: F.silu(x * 1).sum())(x)
        tangent = torch.func.jvp(lambda x: F.silu(x * 1), (x,), (torch.ones_like(x),))[1]
    _, expected = gradient(F.silu, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(tangent, expected, rtol=0, atol=1e-6)


def test_batched_gradients() -> None:
    leaf = torch.randn(40, 65, requires_grad=True)
    dy = torch.randn(3, 40, 65)
    for asked in PRECISIONS:
        with fk.enabled(asked):
            y = F.gelu(leaf * 1)
        (batched,) = torch.autograd.grad(y, leaf, dy, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(y, leaf, one, retain_graph=True)[0] for one in dy]
        assert torch.equal(batched, torch.stack(each))


def test_tangents_of_the_gradient() -> None:
    import torch.autograd.forward_ad as forward_ad

    leaf = torch.randn(ENOUGH, requires_grad=True)
    with fk.enabled("int8"):
        y = F.gelu(leaf * 1)
    with forward_ad.dual_level(), torch.no_grad():
        dy = forward_ad.make_dual(torch.ones(ENOUGH), torch.full((ENOUGH,), 2.0))
        (dx,) = torch.autograd.grad(y, leaf, dy)
        primal, tangent = forward_ad.unpack_dual(dx)
    torch.testing.assert_close(tangent, 2 * primal)


def test_under_the_profiler_it_is_the_same() -> None:
    for asked in PRECISIONS:
        for dtype in DTYPES:
            leaf = torch.randn(67, 65, dtype=dtype).requires_grad_()
            dy = torch.randn(67, 65).to(dtype)
            with fk.enabled(asked):
                y = F.gelu(leaf * 1)
            plain = torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]
            with torch.profiler.profile():
                seen = torch.autograd.grad(y, leaf, dy)[0]
            assert torch.equal(plain, seen)


def test_modes_and_tracers_see_torch_s() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = block().requires_grad_(False), torch.randn(64, 32)
    exact = step(model, x, None)
    counted = []
    for asked in (None, "int8"):
        with FlopCounterMode(display=False) as counter:
            assert (step(model, x, asked) - exact).norm() < 1e-5 * exact.norm()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]
    with fk.enabled("int8"):
        traced = torch.jit.trace(model, x)
    assert "aten::silu" in str(traced.inlined_graph)
    assert "freezekit::" not in str(traced.inlined_graph)  # which names files too


def test_distributed_data_parallel(tmp_path: Path) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        x, grads = torch.randn(64, 32), []
        for wrap in (nn.Module.train, nn.parallel.DistributedDataParallel):
            model = block()
            with fk.enabled("int8"):
                wrap(model)(x).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
        for alone, found in zip(*grads, strict=True):
            torch.testing.assert_close(found, alone)
    finally:
        distributed.destroy_process_group()


def test_plan_counts_codes() -> None:
    model, x = block(), torch.randn(64, 32)
    kept_by = []
    for asked in (None, "int8"):
        with fk.enabled(asked):
            kept_by.append({option.name: option.bytes_kept for option in fk.plan(model, x, machine=MACHINE)})
    exact, lossy = (kept["input learns"] for kept in kept_by)
    assert lossy == exact - 2 * 64 * 64 * 3
    # A layer that learns keeps what it reads beside the codes; beside an input, it makes that again.
    exact, lossy = (kept["depth 0"] for kept in kept_by)
    assert lossy == exact + 2 * 64 * 64


@pytest.mark.gpu
def test_a_gpu_is_refused() -> None:
    x = torch.randn(ENOUGH, device="cuda", requires_grad=True)
    with (
        fk.enabled("int8"),
        pytest.raises(NotImplementedError, match=r"precision=\"int8\".*CPU.*cuda.*precision=None"),
    ):
        F.silu(x * 1)


# The switch.


def test_precision_is_one_that_is_known() -> None:
    for enter in (fk.enable, fk.enabled):
        with pytest.raises(ValueError, match=r"precision must be None, 'int8' or 'int4', got 'int2'"):
            enter("int2")
        for other in (8, torch.int8, True, b"int8"):
            with pytest.raises(TypeError, match="precision must be None, 'int8' or 'int4', got"):
                enter(other)  # type: ignore[arg-type]


def test_the_innermost_that_is_on_rules() -> None:
    assert precision() is None
    fk.enable("int8")
    assert precision() == "int8"
    with fk.enabled("int4"):
        assert precision() == "int4"
        with fk.enabled():
            assert precision() is None
        assert precision() == "int4"
    fk.enable()
    assert precision() is None
    fk.disable()
    assert precision() == "int8"
    fk.disable()
    assert precision() is None


def test_an_exception_restores_it() -> None:
    with fk.enabled("int4"):
        with pytest.raises(ZeroDivisionError), fk.enabled("int8"):
            raise ZeroDivisionError
        assert precision() == "int4"


def test_a_decorator_that_calls_itself() -> None:
    @fk.enabled("int8")
    def inside(deeper: bool) -> str | None:
        with fk.enabled():
            assert precision() is None
        return inside(False) if deeper else precision()

    assert inside(True) == "int8"
    assert precision() is None


def test_blocks_that_end_out_of_turn() -> None:
    """As blocks of two threads do: each takes back its own."""
    first, second = fk.enabled("int8"), fk.enabled()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert precision() is None
    assert fk.is_enabled()
    second.__exit__()


def test_it_holds_in_all_threads() -> None:
    found = []
    with fk.enabled("int8"):
        thread = threading.Thread(target=lambda: found.append(F.silu(torch.ones(ENOUGH, requires_grad=True) * 1)))
        thread.start()
        thread.join()
    assert found[0].grad_fn.name() == LOSSY


def test_a_backward_pass_needs_no_switch() -> None:
    leaf = torch.randn(ENOUGH, requires_grad=True)
    with fk.enabled("int8"):
        y = F.silu(leaf * 1)
        (inside,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], inside)


@pytest.mark.parametrize("measure", [False, True])
def test_explain_says_what_is_lossy(measure: bool) -> None:
    model, x = block().requires_grad_(False), torch.randn(64, 32, requires_grad=True)
    with fk.enabled("int8"):
        rows = {row.name: row for row in fk.explain(model, x, measure=measure)}
    assert [rows[name].lossy for name in "01234"] == [False, True, False, True, False]
    assert rows["1"].bytes_kept == rows["3"].bytes_kept == 64 * 64
    with fk.enabled():
        told = fk.explain(model, x, measure=measure)
    assert not any(row.lossy for row in told)
    assert {row.name: row.bytes_kept for row in told}["1"] == 4 * 64 * 64


def test_converted_layers_do_the_same() -> None:
    model, x = fk.convert(block().requires_grad_(False)), torch.randn(64, 32)
    exact, found = step(model, x, None), step(model, x, "int8")
    assert torch.equal(found, step(block().requires_grad_(False), x, "int8"))
    assert 0 < ((exact - found).norm() / exact.norm()).item() < 0.01
