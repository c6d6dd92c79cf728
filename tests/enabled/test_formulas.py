"""Operands that are cheap formulas of what the graph keeps are not kept, and gradients are stock's to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from bench.memory import bytes_kept
from tests.enabled.helpers import gradients
from tests.observe import MACHINE

SIZE = (2, 8, 16, 16)


def normalized(x: Tensor, eps: float = 1e-10) -> Tensor:
    """As lpips does it: along channels to a length of one."""
    return x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + eps)


def variance(x: Tensor) -> Tensor:
    """As DISTS does it, of features that a pool of squares has kept, and of means that a similarity has."""
    pooled = (x**2).mean((2, 3), keepdim=True).sqrt()
    mean = x.mean((2, 3), keepdim=True)
    return pooled + mean**2 + ((x - mean) ** 2).mean((2, 3), keepdim=True)


def gelu_by_tanh(x: Tensor) -> Tensor:
    """As GPT-2 and those after it write it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_by_erf(x: Tensor) -> Tensor:
    """As BERT and those after it write it."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Attention's scores of normalised queries and keys, as Swin V2 has them."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).transpose(-2, -1)


def heads(x: Tensor) -> Tensor:
    """In another order than that of memory, so that matmul makes copies."""
    return x.permute(0, 2, 1, 3)


def shares(x: Tensor, y: Tensor, divide: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Attention by shares that sum up to one."""
    weights = x.square() + 1
    return divide(weights, weights.sum(-1, keepdim=True)) @ y.transpose(-2, -1)


def global_response(x: Tensor) -> Tensor:
    """As ConvNeXt V2 normalises what an activation gives."""
    length = x.norm(p=2, dim=(2, 3), keepdim=True)
    return x + x * (length / (length.mean(1, keepdim=True) + 1e-6))


# A call of two inputs, and what it keeps in stock and while enabled, in tensors of the size of x. It sees copies, which
# nothing but the graph holds.
FORMULAS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, int]] = {
    "swish": (lambda x, y: x * torch.sigmoid(x), 2, 1),
    "swish, the other way round": (lambda x, y: torch.sigmoid(x) * x, 2, 1),
    "quick gelu": (lambda x, y: x * torch.sigmoid(1.702 * x), 2, 1),
    "quick gelu, divided": (lambda x, y: x * torch.sigmoid(x / 0.5), 2, 1),
    "mish": (lambda x, y: x * torch.tanh(F.softplus(x)), 2, 1),
    "tanh of a cube": (lambda x, y: x * torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3))), 2, 1),
    "gelu by tanh": (lambda x, y: gelu_by_tanh(x), 4, 2),
    "gelu by erf": (lambda x, y: gelu_by_erf(x), 3, 2),
    "gelu by erf, of twice": (lambda x, y: (2 * x) * (1 + torch.erf(0.7 * x)), 3, 2),
    "gelu by erf, of a third": (lambda x, y: (0.3 * x) * (1 + torch.erf(0.7 * x)), 3, 3),
    "difference of features": (lambda x, y: (normalized(x) - normalized(y)) ** 2, 3, 2),
    "square of that": (lambda x, y: (normalized(x) - normalized(y)).square(), 3, 2),
    "product of that": (lambda x, y: (d := normalized(x) - normalized(y)) * d, 3, 2),
    "loss of features": (lambda x, y: F.mse_loss(normalized(x), normalized(y)), 4, 2),
    "loss of each": (lambda x, y: F.mse_loss(normalized(x), normalized(y), reduction="none"), 4, 2),
    "loss of one": (lambda x, y: F.mse_loss(normalized(x), y.detach().clone()), 3, 2),
    "variance": (lambda x, y: variance(x), 2, 1),
    "cosines": (cosines, 4, 2),
    "cosines, of copies": (lambda x, y: cosines(heads(x), heads(y)), 4, 2),
    "cosines, of channels": (lambda x, y: cosines(heads(x).mT, heads(y).mT), 4, 2),
    "shares": (lambda x, y: shares(x, y, torch.div), 4, 3),
    "shares, in place": (lambda x, y: shares(x, y, Tensor.div_), 4, 4),
    "global response of gelu": (lambda x, y: global_response(F.gelu(x)), 2, 1),
    "global response of silu": (lambda x, y: global_response(F.silu(x)), 2, 1),
}


def copied(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: call(x * 1, y * 1)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SIZE, generator=generator).requires_grad_() for _ in range(2))  # type: ignore[return-value]


def assert_same(call: Callable[..., Any], *inputs: Tensor) -> None:
    """Values and gradients enabled are stock's."""
    expected = gradients(call, *inputs)
    with fk.enabled():  # a checkpoint's forward runs again in backward
        found = gradients(call, *inputs)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.stride() == b.stride()
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_kept(name: str, inputs: tuple[Tensor, Tensor]) -> None:
    call, stock, enabled = FORMULAS[name]
    x, y = inputs
    learns = lambda x: copied(call)(x, y)  # noqa: E731
    assert bytes_kept(learns, x) // x.nbytes == stock
    with fk.enabled():
        assert bytes_kept(learns, x) // x.nbytes == enabled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", FORMULAS)
def test_gradients(
    name: str, memory_format: torch.memory_format, dtype: torch.dtype, inputs: tuple[Tensor, Tensor]
) -> None:
    x, y = (t.detach().to(dtype, memory_format=memory_format).requires_grad_() for t in inputs)
    assert_same(copied(FORMULAS[name][0]), x, y)
    assert_same(copied(FORMULAS[name][0]), x, y.detach())
    assert_same(FORMULAS[name][0], x, y)  # of leaves


@pytest.mark.parametrize("size", [(2, 3, 37, 41), (1, 257, 1, 1), (3, 2, 300, 1), (2, 1, 5, 5)], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_sizes(name: str, size: tuple[int, ...]) -> None:
    assert_same(copied(FORMULAS[name][0]), *(torch.randn(size, requires_grad=True) for _ in range(2)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("size", [SIZE, (3, 7, 5, 11), (2, 8, 65, 67)], ids=str)
@pytest.mark.parametrize(
    ("call", "operator"),
    [
        (lambda x: x * torch.sigmoid(x), "aten::sigmoid"),
        (lambda x: x * torch.sigmoid(1.702 * x), "aten::sigmoid"),
        (lambda x: F.silu(x) * x, "aten::silu"),
    ],
    ids=["swish", "quick gelu", "silu"],
)
def test_a_sigmoid_is_tried_and_made_again_without_torch_s_operator(
    call: Callable[[Tensor], Tensor], operator: str, size: tuple[int, ...], layout: torch.memory_format
) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("there is no other way on this processor")
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(memory_format=layout).requires_grad_()
    assert_same(call, x)
    with fk.enabled(), torch.profiler.profile() as profile:
        gradients(call, x)
    assert sum(event.count for event in profile.key_averages() if event.key == operator) == 1


@pytest.mark.parametrize("call", [lambda x: x * torch.sigmoid(1.702 * x), lambda x: F.silu(x) * x])
def test_sigmoids_of_what_is_not_finite(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 50
    x[::97], x[::101], x[::103] = float("inf"), -float("inf"), float("nan")
    x.requires_grad_()
    expected = gradients(call, x)
    with fk.enabled():
        torch.testing.assert_close(gradients(call, x), expected, rtol=0, atol=0, equal_nan=True)


def test_a_difference_of_what_nobody_keeps_is_kept(inputs: tuple[Tensor, Tensor]) -> None:
    """Torch lets its operands be written to, and so does this."""

    def call(x: Tensor, y: Tensor) -> Tensor:
        a = x * 1
        squared = (a - y.mean(1, keepdim=True)) ** 2
        a.mul_(2)
        return squared + a

    assert_same(call, *inputs)


def test_a_square_is_no_formula_of_itself(inputs: tuple[Tensor, Tensor]) -> None:
    """Half of x tells x; but where it is x that is kept, nothing is saved, and x may be written to as in torch."""

    def call(x: Tensor, y: Tensor) -> Tensor:
        doubled = 2 * x
        square = doubled * doubled
        doubled.data.mul_(3)
        return square

    assert_same(call, *inputs)


def test_in_place_on_the_operand_afterwards(inputs: tuple[Tensor, Tensor]) -> None:
    """In stock an error; here the gradient of what was computed, or the same error."""

    def run() -> Tensor:
        x = inputs[0] * 1
        s = torch.sigmoid(1.5 * x)
        y = x * s
        with torch.no_grad():
            s.zero_()
        return torch.autograd.grad(y.sum(), inputs[0])[0]

    x = inputs[0] * 1
    (expected,) = torch.autograd.grad((x * torch.sigmoid(1.5 * x)).sum(), inputs[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run()
    with fk.enabled():
        assert torch.equal(run(), expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.data.mul_(2),
        lambda t: t.detach().numpy().__imul__(2),
        lambda t: torch.no_grad()(lambda: t.mul_(2))(),
        lambda t: t.data.view(-1)[-1:].neg_(),
    ],
    ids=["data", "numpy", "no_grad", "one element"],
)
@pytest.mark.parametrize("what", ["x", "s", "d"])
def test_writes_in_between(what: str, write: Callable[[Tensor], object], inputs: tuple[Tensor, Tensor]) -> None:
    """Before the product or the power: what it reads is what it keeps. Where stock refuses, so may this."""

    def run() -> tuple[Tensor, ...] | str:
        x, y = (t * 1 for t in inputs)
        s = torch.sigmoid(1.5 * x)
        d = normalized(x) - normalized(y)
        write({"x": x, "s": s, "d": d}[what])
        try:
            return torch.autograd.grad((x * s).sum() + (d**2).sum(), (x, y, s, d), allow_unused=True)
        except RuntimeError as error:
            return str(error).split(":")[0]

    expected = run()
    with fk.enabled():
        found = run()
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


Result = tuple[Tensor, ...] | str  # gradients, or the error


def check_writes(run: Callable[..., Result], what: str) -> None:
    """Written to before its operator, `what` gives stock's result; behind it, an error or what was computed."""

    def same(a: Result, b: Result) -> bool:
        if isinstance(a, str) or isinstance(b, str):
            return a == b
        return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))

    expected, untouched, refused = run(before=what), run(), run(after=what)
    with fk.enabled():
        assert same(run(before=what), expected)
        found = run(after=what)
    if isinstance(found, str):
        assert found == refused or "autograd does not see" in found
    else:
        assert same(found, untouched) or same(found, refused)


@pytest.mark.parametrize(
    "write", [lambda t: t.data.mul_(2), torch.no_grad()(lambda t: t.mul_(2))], ids=["data", "no_grad"]
)
@pytest.mark.parametrize("what", ["x", "inner", "outer", "sum", "half"])
@pytest.mark.parametrize("by", [torch.tanh, torch.erf])
def test_writes_to_parts_of_a_gelu(
    by: Callable[[Tensor], Tensor], what: str, write: Callable[[Tensor], object], inputs: tuple[Tensor, Tensor]
) -> None:
    """Before the product: what it reads is what counts. After it: no matter, an error, or what stock makes of it."""

    def run(before: str = "", after: str = "") -> Result:
        x = inputs[0] * 1
        inner = 0.8 * (x + 0.044715 * torch.pow(x, 3.0)) if by is torch.tanh else x / math.sqrt(2)
        outer = by(inner)
        parts = {"x": x, "inner": inner, "outer": outer, "sum": 1.0 + outer, "half": 0.5 * x, "": torch.ones(1)}
        write(parts[before])
        y = parts["half"] * parts["sum"]
        write(parts[after])
        try:
            return torch.autograd.grad(y.sum(), (x, inner, outer, parts["sum"], parts["half"]), allow_unused=True)
        except RuntimeError as error:
            return str(error).split(":")[0]

    check_writes(run, what)


@pytest.mark.parametrize(
    "write", [lambda t: t.data.mul_(2), torch.no_grad()(lambda t: t.mul_(2))], ids=["data", "no_grad"]
)
@pytest.mark.parametrize("what", ["x", "length", "quotient", "moved", "first"])
def test_writes_to_parts_of_cosines(
    what: str, write: Callable[[Tensor], object], inputs: tuple[Tensor, Tensor]
) -> None:
    """As of a GELU's parts."""

    def run(before: str = "", after: str = "") -> Result:
        x, y = (t * 1 for t in inputs)
        length = x.norm(dim=-1, keepdim=True)
        quotient = x / length
        moved = heads(quotient).reshape(-1, 8, 16)
        parts = {"x": x, "length": length, "quotient": quotient, "moved": moved, "first": x[:1], "": torch.ones(1)}
        write(parts[before])
        z = torch.bmm(moved, heads(y).reshape(-1, 16, 8))
        write(parts[after])
        try:
            return torch.autograd.grad(z.sum(), (x, y, quotient, moved), allow_unused=True)
        except RuntimeError as error:
            return str(error).split(":")[0]

    check_writes(run, what)


@pytest.mark.parametrize("write", [lambda t: t.data.zero_(), lambda t: t.untyped_storage().resize_(0)])
@pytest.mark.parametrize("of", ["sigmoid", "difference"])
def test_an_unseen_write_to_the_source_is_an_error(
    of: str, write: Callable[[Tensor], object], inputs: tuple[Tensor, Tensor]
) -> None:
    with fk.enabled():
        x = inputs[0] * 1
        inner = 1.5 * x if of == "sigmoid" else normalized(x) - normalized(inputs[1])
        z = x * torch.sigmoid(inner) if of == "sigmoid" else inner**2
    write(x)
    with pytest.raises(RuntimeError, match="a way that autograd does not see"):
        torch.autograd.grad(z.sum(), inner)


@pytest.mark.parametrize("name", FORMULAS)
def test_situations(name: str, inputs: tuple[Tensor, Tensor]) -> None:
    """Double backward, retained graphs, checkpoints, offloading, autocast."""
    call = copied(FORMULAS[name][0])

    def twice(x: Tensor, y: Tensor) -> Tensor:
        dx, dy = torch.autograd.grad(call(x, y * 2).square().sum(), (x, y), create_graph=True, materialize_grads=True)
        return dx.square() + dy

    def retained(x: Tensor, y: Tensor) -> Tensor:
        z = call(x, y)
        (dx,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
        return z.sum() * dx.sum() + x

    def offloaded(x: Tensor, y: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return call(x, y)

    def low(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(torch.matmul(x, x), y)

    for situation in (
        twice,
        retained,
        offloaded,
        low,
        lambda x, y: checkpoint(call, x, y, use_reentrant=False),
    ):
        assert_same(situation, *inputs)


@pytest.mark.parametrize("name", FORMULAS)
def test_reentrant_checkpoints(name: str, inputs: tuple[Tensor, Tensor]) -> None:
    def step() -> list[Tensor | None]:
        x, y = (t.detach().clone().requires_grad_() for t in inputs)
        checkpoint(copied(FORMULAS[name][0]), x, y, use_reentrant=True).sum().backward()
        return [x.grad, y.grad]

    expected = step()
    with fk.enabled():
        for a, b in zip(step(), expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_hooks_on_inner_tensors(inputs: tuple[Tensor, Tensor]) -> None:
    def call(x: Tensor, y: Tensor) -> Tensor:
        s = torch.sigmoid(1.5 * x)
        d = normalized(x) - normalized(y)
        t = torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3)))
        for inner in (s, d, t):
            inner.register_hook(lambda grad: grad * 2)
            inner.retain_grad()
        z = (x * s).sum() + (d**2).sum() + (0.5 * x * (1 + t)).sum()
        z.backward(retain_graph=True)
        assert s.grad is not None
        assert d.grad is not None
        assert t.grad is not None
        return z * 0 + s.grad + d.grad + t.grad

    assert_same(call, *inputs)


def test_others_hooks_on_what_is_saved_see_all_of_it(inputs: tuple[Tensor, Tensor]) -> None:
    def seen() -> list[torch.Size]:
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            for call, _, _ in FORMULAS.values():
                call(*inputs)
        return shapes

    stock = seen()
    with fk.enabled():
        assert seen() == stock


def test_a_sigmoid_of_which_the_graph_is_freed(inputs: tuple[Tensor, Tensor]) -> None:
    """A forward raises nothing of its own, and another use of the result has what it needs."""

    def call(x: Tensor, y: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        (first,) = torch.autograd.grad(s.sum(), x)
        x * s
        s = torch.sigmoid(x)
        x * s
        y * s
        (second,) = torch.autograd.grad((x * s + s.square()).sum(), x)
        return (first + second) * y

    assert_same(call, *inputs)


def test_parts_of_a_backward_pass(inputs: tuple[Tensor, Tensor]) -> None:
    """What one node has computed for another that does not ask for it, is right when that asks in a later pass."""

    def call(x: Tensor, y: Tensor) -> Tensor:
        t = torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3)))
        v = 1.0 + t
        z = (0.5 * x * v).sum()
        (dv,) = torch.autograd.grad(z, v, retain_graph=True)
        (dt,) = torch.autograd.grad(z, t, retain_graph=True)
        (first,) = torch.autograd.grad(z, x, retain_graph=True)
        (second,) = torch.autograd.grad(z, x, retain_graph=True)
        return (dv + dt + first + second) * x + y

    assert_same(call, *inputs)


def test_a_write_to_what_a_node_shows_of_its_saved_tensors(inputs: tuple[Tensor, Tensor]) -> None:
    """Torch's own says in backward that it was written to; here it was made for whoever asked."""
    x = inputs[0]
    (expected,) = torch.autograd.grad((x * torch.sigmoid(x)).sum(), x)
    with fk.enabled():
        y = x * torch.sigmoid(x)
    with torch.no_grad():
        y.grad_fn._saved_other.zero_()
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, expected)


def test_a_tanh_of_which_two_sums_are_made(inputs: tuple[Tensor, Tensor]) -> None:
    def call(x: Tensor, y: Tensor) -> Tensor:
        t = torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3)))
        return 0.5 * x * (1.0 + t) + y * (2 + t) + x * t + 0.25 * x * (t + 3)

    assert_same(copied(call), *inputs)


def test_the_graph_is_torch_s_own(inputs: tuple[Tensor, Tensor]) -> None:
    with fk.enabled():
        z = inputs[0] * torch.sigmoid(inputs[0])
    assert z.grad_fn is not None
    assert z.grad_fn.name() == "MulBackward0"
    assert z.grad_fn.next_functions[1][0].name() == "SigmoidBackward0"


def test_nothing_outlives_the_graph(inputs: tuple[Tensor, Tensor]) -> None:
    with fk.enabled():
        x = inputs[0] * 1
        alive = torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage())
        z = x * torch.sigmoid(x) + variance(x)
        del x
        assert not alive.expired()
        del z
    assert alive.expired()


def test_a_leaf_is_held_no_longer_than_the_graph() -> None:
    with fk.enabled(), torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.clone):
        leaf = torch.ones(3, requires_grad=True)
        alive = torch.multiprocessing.reductions.StorageWeakRef(leaf.untyped_storage())
        z = leaf**2
        del leaf, z
    assert alive.expired()


@pytest.mark.parametrize("name", FORMULAS)
def test_compiled(name: str, inputs: tuple[Tensor, Tensor]) -> None:
    call = copied(FORMULAS[name][0])
    expected = gradients(call, *inputs)
    torch._dynamo.reset()
    with fk.enabled():
        found = gradients(torch.compile(call, backend="aot_eager"), *inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["quick gelu", "mish", "variance", "gelu by tanh", "gelu by erf"])
def test_compiled_autograd(name: str, inputs: tuple[Tensor, Tensor]) -> None:
    call = copied(FORMULAS[name][0])
    x = inputs[0]
    (expected,) = torch.autograd.grad(call(*inputs).sum(), x)
    with fk.enabled():
        z = call(*inputs).sum()
    from torch._dynamo import compiled_autograd

    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        z.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


class Network(nn.Module):
    """A formula behind a layer."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.call = nn.Conv2d(8, 8, 1), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.conv(x), x).sum()


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_explain_and_plan_count_formulas(name: str, measure: bool, inputs: tuple[Tensor, Tensor]) -> None:
    model, x = Network(FORMULAS[name][0]).requires_grad_(False), inputs[0]
    numbers = bytes_kept(model, x) - fk.explain(model, x, measure=measure).bytes_kept  # which torch shows to no hook
    with fk.enabled():
        kept, told = bytes_kept(model, x), fk.explain(model, x, measure=measure).bytes_kept
        planned = {option.name: option.bytes_kept for option in fk.plan(model, x, machine=MACHINE)}
    assert planned["input learns"] == told
    assert kept - told == numbers <= 4 * 8


def test_explain_tells_of_formulas(inputs: tuple[Tensor, Tensor]) -> None:
    model = Network(lambda x, y: normalized(x) - normalized(y)).requires_grad_(False)
    squared = Network(lambda x, y: (normalized(x) - normalized(y)).pow(2)).requires_grad_(False)
    with fk.enabled():
        assert fk.explain(squared, inputs[0]).bytes_kept == fk.explain(model, inputs[0]).bytes_kept
        made_from = {row.layer: row.made_from for row in fk.explain(squared, inputs[0]) if row.made_from}
    assert made_from == {"Network: pow": ("Network: div",)}  # and from what it keeps itself


@pytest.mark.parametrize("activation", [F.elu, F.softplus, lambda x: F.elu(x, 0.5)])
def test_other_activations_behind_a_group_norm(
    activation: Callable[[Tensor], Tensor], inputs: tuple[Tensor, Tensor]
) -> None:
    norm = nn.GroupNorm(2, 8).requires_grad_(False)
    x, gate = inputs[0], inputs[1].mean((2, 3), keepdim=True).detach().requires_grad_()
    with fk.enabled():
        assert bytes_kept(lambda x: activation(norm(x)), x) // x.nbytes == 1
        assert bytes_kept(lambda x: activation(norm(x)) * gate, x) // x.nbytes == 1
    assert_same(lambda x, g: activation(norm(x)) * g, x, gate)


@pytest.mark.parametrize(
    "call", [gelu_by_tanh, gelu_by_erf, lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)]
)
def test_forward_mode_ad_of_what_learns_is_stock_s(call: Callable[[Tensor], Tensor]) -> None:
    """The tangent of a number is a tensor of zeros that has no memory."""
    x, tangent = torch.randn(2, *SIZE).unbind()
    results = []
    for switch in (nullcontext, fk.enabled):
        with switch(), forward_ad.dual_level():
            y = call(forward_ad.make_dual(x.clone().requires_grad_(), tangent))
            results.append(forward_ad.unpack_dual(y).tangent.detach())
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: x * torch.sigmoid(1e39 * x),
        lambda x: x * torch.sigmoid(x * torch.tensor(1e39, dtype=torch.float64)),
        lambda x: x * torch.sigmoid(x + 1e39),
        lambda x: x * torch.tanh(x / -1e39),
        lambda x: x * torch.tanh(torch.pow(x, 3) * 1e39),
        lambda x: 0.5 * x * (1e39 + torch.tanh(x)),
        lambda x: x * 2.0**200 * (1 + torch.erf(x / 2**0.5)),
        lambda x: F.linear(x * torch.sigmoid(x * 1e39), torch.ones(4, 16, requires_grad=True)),
    ],
)
def test_numbers_that_float32_has_not(formula: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(SIZE, requires_grad=True)
    (expected,) = torch.autograd.grad(formula(x * 1).sum(), x)
    with fk.enabled():
        y = formula(x * 1)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: F.silu(F.group_norm(x, 2)) * x,
        lambda x: F.linear(F.silu(F.group_norm(x, 2)), torch.ones(4, 16, requires_grad=True)),
    ],
)
def test_backward_in_inference_mode(formula: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(SIZE, requires_grad=True)
    sums = [formula(x * 1).sum()]
    with fk.enabled():
        sums.append(formula(x * 1).sum())
    with torch.inference_mode():
        (expected,), (found,) = (torch.autograd.grad(y, x) for y in sums)
    assert torch.equal(found, expected)
