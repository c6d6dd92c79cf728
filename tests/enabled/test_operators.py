"""Each operator with a stand-in: values and gradients are torch's, and less is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import freezekit as fk
from bench.memory import trace
from tests.enabled.helpers import first, gradients, tolerance
from tests.observe import bytes_saved


@dataclass(frozen=True)
class OperatorCase:
    """`call(x)` keeps at most `share` of what torch keeps for it; `exact` where no sum is taken in another order."""

    name: str
    call: Callable[[Tensor], Any]
    size: tuple[int, ...]
    share: float
    exact: bool = True


def layer(
    kind: type[nn.Module], *args: Any, size: tuple[int, ...], share: float, exact: bool = True, **kw: Any
) -> OperatorCase:
    torch.manual_seed(0)
    module = kind(*args, **kw).eval().requires_grad_(False)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        module.running_mean.normal_()  # type: ignore[union-attr]
    return OperatorCase(kind.__name__, module, size, share, exact)


IMAGE = (2, 4, 16, 16)
BIT = 1 / 32 + 0.001  # of a float32
CASES = [
    layer(nn.Conv1d, 4, 6, 3, stride=2, padding=1, size=(2, 4, 33), share=0, exact=False),
    layer(nn.Conv2d, 4, 6, 3, padding=1, groups=2, size=IMAGE, share=0, exact=False),
    layer(nn.Conv2d, 4, 6, (3, 2), stride=2, padding=2, dilation=2, size=IMAGE, share=0, exact=False),
    layer(nn.Conv2d, 4, 6, 3, padding="same", size=IMAGE, share=0, exact=False),
    layer(nn.Conv2d, 4, 6, 3, padding=1, padding_mode="reflect", size=IMAGE, share=0, exact=False),
    layer(nn.Conv2d, 4, 6, 3, padding=1, size=(4, 16, 16), share=0, exact=False),
    layer(nn.Conv3d, 2, 3, 3, padding=1, size=(1, 2, 6, 6, 6), share=0, exact=False),
    layer(nn.ConvTranspose1d, 4, 6, 3, stride=2, size=(2, 4, 17), share=0, exact=False),
    layer(nn.ConvTranspose2d, 4, 6, 3, stride=2, output_padding=1, size=IMAGE, share=0, exact=False),
    layer(nn.ConvTranspose3d, 2, 3, 3, size=(1, 2, 5, 5, 5), share=0, exact=False),
    layer(nn.BatchNorm1d, 4, size=(8, 4, 9), share=0.05, exact=False),
    layer(nn.BatchNorm2d, 4, size=IMAGE, share=0.05, exact=False),
    layer(nn.BatchNorm3d, 4, size=(2, 4, 5, 5, 5), share=0.05, exact=False),
    layer(nn.ReLU, size=IMAGE, share=BIT),
    layer(nn.ReLU6, size=IMAGE, share=BIT),
    layer(nn.Hardtanh, -0.5, 0.7, size=IMAGE, share=BIT),
    layer(nn.LeakyReLU, 0.2, size=IMAGE, share=BIT),
    layer(nn.Threshold, 0, 0, size=IMAGE, share=BIT),
    layer(nn.Threshold, 0.3, -0.7, size=IMAGE, share=BIT),
    layer(nn.PReLU, size=IMAGE, share=BIT),
    layer(nn.PReLU, 4, size=IMAGE, share=BIT),
    OperatorCase("relu_", lambda x: F.relu_(x * 1), IMAGE, BIT),
    OperatorCase("relu6_", lambda x: F.relu6(x * 4, inplace=True), IMAGE, BIT),
    OperatorCase("hardtanh_", lambda x: F.hardtanh_(x * 1), IMAGE, BIT),
    OperatorCase("leaky_relu_", lambda x: F.leaky_relu_(x * 1, 0.1), IMAGE, BIT),
    OperatorCase("threshold_", lambda x: F.threshold_(x * 1, -0.3, 20), IMAGE, BIT),
    OperatorCase("threshold of gaps", lambda x: F.threshold((x * 1)[..., ::2], 0.1, 1), IMAGE, BIT),
    OperatorCase("threshold_ of gaps", lambda x: F.threshold_((x * 1)[..., ::2], 0.1, 1), IMAGE, BIT),
    OperatorCase("dropout", lambda x: F.dropout(x, 0.3), IMAGE, BIT),
    OperatorCase("dropout_", lambda x: F.dropout(x * 1, 0.3, inplace=True), IMAGE, BIT),
    OperatorCase("max_pool1d", lambda x: F.max_pool1d(x * 1, 3, 2, 1), (2, 4, 32), 0.07),
    OperatorCase("max_pool2d", lambda x: F.max_pool2d(x * 1, 3, 2, 1), IMAGE, 0.06),
    OperatorCase("max_pool2d, NHWC", lambda x: F.max_pool2d(x.to(memory_format=torch.channels_last), 2), IMAGE, 0.06),
    OperatorCase("max_pool2d_with_indices", lambda x: F.max_pool2d(x * 1, 2, return_indices=True), IMAGE, 0.06),
    OperatorCase("max_pool3d", lambda x: F.max_pool3d(x * 1, 2), (1, 2, 6, 6, 6), 0.07),
    OperatorCase(
        "max_pool3d, NDHWC",
        lambda x: F.max_pool3d(x.to(memory_format=torch.channels_last_3d), 2, return_indices=True),
        (1, 2, 6, 6, 6),
        0.07,
    ),
    OperatorCase("avg_pool1d", lambda x: F.avg_pool1d(x.clone(), 3), (2, 4, 32), 0),
    OperatorCase("avg_pool2d", lambda x: F.avg_pool2d(x.clone(), 3, 2, 1, True, False), IMAGE, 0),
    OperatorCase("avg_pool3d", lambda x: F.avg_pool3d(x.clone(), 2, divisor_override=3), (1, 2, 6, 6, 6), 0),
    OperatorCase("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x.clone(), 5), (2, 4, 32), 0),
    OperatorCase("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x.clone(), (5, 3)), IMAGE, 0),
    OperatorCase("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x.clone(), 2), (1, 2, 6, 6, 6), 0),
    *[
        OperatorCase(f"{mode} {n}", lambda x, n=n, m=mode: F.pad(x.clone(), (1, 2) * n, m), (1, 2) + (5,) * n, 0)
        for mode in ("reflect", "replicate")
        for n in (1, 2, 3)
    ],
]  # fmt: skip


def in_float(case: OperatorCase) -> Callable[[Tensor], Any]:
    return copy.deepcopy(case.call).float() if isinstance(case.call, nn.Module) else case.call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_gradients_and_bytes(case: OperatorCase, dtype: torch.dtype) -> None:
    x = torch.randn(case.size).to(dtype).requires_grad_()
    if isinstance(case.call, nn.Module):
        case.call.to(dtype)
    if case.name == "avg_pool3d" and dtype == torch.bfloat16:
        with fk.enabled(), pytest.raises(NotImplementedError, match="not implemented for 'BFloat16'"):
            case.call(x)
        return
    stock = gradients(case.call, x)
    with fk.enabled():
        ours = gradients(case.call, x)
    for a, b in zip(ours, stock, strict=True):
        assert a is not None
        assert b is not None
        assert (a.stride(), a.dtype) == (b.stride(), b.dtype)
        if case.exact or a is ours[0]:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, **tolerance(b))
    owned = [*case.call.parameters(), *case.call.buffers()] if isinstance(case.call, nn.Module) else []
    torch_s = bytes_saved(lambda: case.call(x * 1), owned)
    with fk.enabled():
        mine = bytes_saved(lambda: case.call(x * 1), owned)
    assert torch_s > 0
    assert mine <= case.share * torch_s * max(1, 4 / x.element_size())


def test_nan_passes_a_threshold() -> None:
    x = torch.tensor([float("nan"), 0.5, 1.0, -1.0] * 20, requires_grad=True)
    stock = gradients(lambda x: F.threshold(x, 0.5, 7), x)
    with fk.enabled():
        ours = gradients(lambda x: F.threshold(x, 0.5, 7), x)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("normalise", [F.layer_norm, F.group_norm], ids=["layer", "group"])
def test_a_norm_keeps_nothing_for_its_bias(normalise: Callable[..., Tensor]) -> None:
    x, w, b = torch.randn(2, 6, 6), torch.randn(6), torch.randn(6, requires_grad=True)
    shape = (6,) if normalise is F.layer_norm else 3
    call = lambda w, b: normalise(x, shape, w, b)  # noqa: E731
    stock = gradients(call, w, b)
    with fk.enabled():
        ours = gradients(call, w, b)
        assert bytes_saved(lambda: call(w, b)) == 0
    for a, c in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)


def test_group_norm_s_statistics_are_torch_s() -> None:
    x, b = torch.randn(2, 6, 4), torch.randn(6, requires_grad=True)
    call = lambda: torch.native_group_norm(x, None, b, 2, 6, 4, 3, 1e-5)  # noqa: E731
    stock = [y.requires_grad for y in call()]
    with fk.enabled():
        assert [y.requires_grad for y in call()] == stock


TRAINABLE: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("conv", nn.Conv2d(4, 4, 3)),
    ("batch statistics", nn.BatchNorm2d(4).requires_grad_(False)),
    ("batch norm's weight", nn.BatchNorm2d(4).eval()),
    ("layer norm", nn.LayerNorm(16).requires_grad_(False)),
    ("negative slope", lambda x: F.leaky_relu(x, -0.1)),
]


@pytest.mark.parametrize(("name", "call"), TRAINABLE, ids=[name for name, _ in TRAINABLE])
def test_what_gains_nothing_is_torch_s(name: str, call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    with fk.enabled():
        node = call(x).grad_fn
    seen, nodes = set(), [node]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        assert "Freezekit" not in node.name()
        nodes += [previous for previous, _ in node.next_functions]


def test_in_place_errors_and_versions_are_torch_s() -> None:
    leaf = torch.ones(3, requires_grad=True)
    for call in (F.relu_, F.hardtanh_, F.leaky_relu_):
        with pytest.raises(RuntimeError) as stock:
            call(leaf)
        with fk.enabled(), pytest.raises(RuntimeError) as ours:
            call(leaf)
        assert str(ours.value) == str(stock.value)
    for on in (False, True):
        x = leaf * 1
        squared = x * x
        if on:
            fk.enable()
        try:
            before = x._version
            F.relu_(x)
            assert x._version == before + 1
        finally:
            if on:
                fk.disable()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squared.sum().backward()


def test_in_place_on_a_view() -> None:
    x = torch.randn(4, 6, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        y = x * 1
        F.relu_(y[1:3, ::2])
        return y * 2

    stock = gradients(call, x)
    with fk.enabled():
        ours = gradients(call, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


def test_out_variants_are_untouched() -> None:
    x = torch.randn(1, 2, 4, 4)
    with fk.enabled():
        out = torch.empty(0)
        torch._C._nn.avg_pool2d(x, 2, out=out)
        assert torch.equal(out, F.avg_pool2d(x, 2))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_sparse_gradient_is_taken_where_torch_takes_it(case: OperatorCase) -> None:
    call = in_float(case)

    def found() -> Tensor | type:
        torch.manual_seed(0)
        x = torch.ones(case.size, requires_grad=True)
        y = first(call(x))
        try:
            return torch.autograd.grad(y, x, torch.ones_like(y).to_sparse())[0]
        except RuntimeError as error:
            return type(error)

    stock = found()
    with fk.enabled():
        ours = found()
    if isinstance(stock, Tensor) and isinstance(ours, Tensor):
        assert torch.equal(ours.to_dense(), stock.to_dense())
        assert ours.layout == stock.layout
    else:
        assert isinstance(stock, type)
        assert isinstance(ours, type)
        assert issubclass(ours, stock)


def test_double_backward() -> None:
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval(), nn.LeakyReLU(0.1), nn.AvgPool2d(2)).double()
    conv.requires_grad_(False)
    x = torch.randn(1, 2, 8, 8, dtype=torch.double, requires_grad=True)
    with fk.enabled():
        assert torch.autograd.gradcheck(conv, x)
        assert torch.autograd.gradgradcheck(conv, x)


def test_autocast_is_above() -> None:
    conv = nn.Conv2d(4, 4, 3).requires_grad_(False)
    x = torch.randn(IMAGE, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.relu(conv(x))

    stock = gradients(call, x)
    with fk.enabled():
        ours = gradients(call, x)
        assert bytes_saved(lambda: call(x), conv.parameters()) < bytes_saved(lambda: x * x)
    assert [t.dtype for t in ours] == [t.dtype for t in stock] == [torch.bfloat16, torch.float32]  # type: ignore[union-attr]
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b)


def test_anomaly_mode_and_saved_tensor_hooks() -> None:
    conv = nn.Conv2d(2, 2, 3).requires_grad_(False)
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    expected = gradients(lambda x: F.relu(conv(x)), x)
    with fk.enabled(), torch.autograd.detect_anomaly(check_nan=True), torch.autograd.graph.save_on_cpu():
        ours = gradients(lambda x: F.relu(conv(x)), x)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("layer", [nn.Threshold(0.3, -0.7), nn.ReLU(), nn.MaxPool2d(2)], ids=lambda m: type(m).__name__)
def test_what_is_kept_does_not_depend_on_who_looks(layer: nn.Module) -> None:
    x = torch.randn(IMAGE, requires_grad=True)
    with fk.enabled():
        plain = bytes_saved(lambda: layer(x * 1))
        with torch.profiler.profile():
            assert bytes_saved(lambda: layer(x * 1)) == plain
        assert plain < x.nbytes / 2
        for measure in (False, True):
            assert fk.explain(layer, x, measure=measure).bytes_kept == plain


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_freed_graph_is_torch_s_error(case: OperatorCase) -> None:
    """A node that keeps no tensor would run once more, and gradients would be added twice without a word."""
    call = in_float(case)
    x = torch.randn(case.size, requires_grad=True)

    def error() -> str:
        y = first(call(x.clone())).sum()
        y.backward()
        with pytest.raises(RuntimeError, match="a second time") as raised:
            y.backward()
        return str(raised.value)

    expected = error()
    with fk.enabled():
        assert error() == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_freed_graph_of_a_gradient_is_as_torch_s(case: OperatorCase) -> None:
    """Where torch's keeps nothing, it may run once more."""
    call = in_float(case)
    x = torch.randn(case.size, requires_grad=True)

    def raised() -> str:
        y = first(call(x.clone()))
        dy = torch.randn_like(y).requires_grad_()
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        torch.autograd.grad(dx.sum(), dy)
        try:
            torch.autograd.grad(dx.sum(), dy)
        except RuntimeError as error:
            return str(error)
        return ""

    expected = raised()
    with fk.enabled():
        assert raised() == expected


LEARNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "convolution": lambda x, bias: F.conv2d(x, torch.ones(4, 4, 3, 3), bias),
    "transposed convolution": lambda x, bias: F.conv_transpose2d(x, torch.ones(4, 4, 3, 3), bias),
    "batch norm": lambda x, bias: F.batch_norm(x, torch.zeros(4), torch.ones(4), torch.ones(4), bias),
    "group norm": lambda x, bias: F.group_norm(x, 2, torch.ones(4), bias),
    "layer norm": lambda x, bias: F.layer_norm(x.transpose(1, 3), (4,), torch.ones(4), bias),
}


@pytest.mark.parametrize("name", LEARNS)
def test_a_freed_graph_of_a_bias_alone_is_torch_s_error(name: str) -> None:
    x, bias = torch.randn(IMAGE), torch.randn(4, requires_grad=True)
    for on in (False, True):
        if on:
            fk.enable()
        try:
            y = LEARNS[name](x, bias)
        finally:
            if on:
                fk.disable()
        y.sum().backward()
        with pytest.raises(RuntimeError, match="a second time"):
            y.sum().backward()


@pytest.mark.parametrize("name", LEARNS)
@pytest.mark.parametrize("learns", ["bias", "both"])
def test_nodes_have_torch_s_edges(name: str, learns: str) -> None:
    x, bias = torch.randn(IMAGE, requires_grad=learns == "both"), torch.randn(4, requires_grad=True)

    def edges() -> list[tuple[bool, int]]:
        return [(node is None, nr) for node, nr in LEARNS[name](x, bias).grad_fn.next_functions]

    expected = edges()
    with fk.enabled():
        assert edges() == expected


def test_a_prelu_s_node_has_torch_s_edges() -> None:
    x, slope = torch.randn(IMAGE, requires_grad=True), torch.full((4,), 0.2)
    expected = len(F.prelu(x, slope).grad_fn.next_functions)
    with fk.enabled():
        assert len(F.prelu(x, slope).grad_fn.next_functions) == expected


def test_a_threshold_in_place_where_elements_share_memory() -> None:
    """The one in-place operator that torch lets write there."""
    x = torch.randn(1, 4, requires_grad=True)
    expected = F.threshold_(x.clone().expand(3, 4), 0.1, 0.05)
    with fk.enabled():
        assert torch.equal(F.threshold_(x.clone().expand(3, 4), 0.1, 0.05), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_tangent_of_the_gradient(case: OperatorCase) -> None:
    """Forward-mode AD over a backward pass: dx is linear in dy."""
    call = in_float(case)

    def tangents() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        x = torch.randn(case.size, requires_grad=True)
        y = first(call(x))
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.randn_like(y), torch.randn_like(y))
            dx = forward_ad.unpack_dual(torch.autograd.grad(y, x, dy)[0])
            assert dx.tangent is not None
            return dx.primal.clone(), dx.tangent.clone()

    expected = tangents()
    with fk.enabled():
        for found, stock in zip(tangents(), expected, strict=True):
            torch.testing.assert_close(found, stock, **tolerance(stock))


def test_a_slope_for_each_channel_takes_no_more_tensors_than_torch() -> None:
    x, slope = torch.randn(4, 4, 64, 64, requires_grad=True), torch.rand(4)

    def most() -> int:
        return trace(x.device, lambda: torch.autograd.grad(F.prelu(x, slope).sum(), x)).peak

    stock = most()
    with fk.enabled():
        assert x.nbytes < most() <= stock + x.nbytes / 8  # bits
