"""torch.compile: one graph, torch's results, and bits kept between forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import freezekit as fk
from tests.observe import bytes_saved


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.ReflectionPad2d(1),
        nn.Conv2d(4, 4, 3), nn.LeakyReLU(), nn.ConvTranspose2d(4, 4, 2, stride=2), nn.GroupNorm(2, 4), nn.ReLU6(),
        nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3),
    ).eval()  # fmt: skip


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("frozen", [False, True])
def test_one_graph_with_torch_s_results(frozen: bool) -> None:
    stock = network().requires_grad_(not frozen)
    ours = torch.compile(fk.convert(network()), backend="aot_eager", fullgraph=True)
    ours.load_state_dict({f"_orig_mod.{k}": v for k, v in stock.state_dict().items()})
    ours.requires_grad_(not frozen)
    x = torch.randn(2, 3, 16, 16)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(a), stock(b)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == frozen
        if not frozen:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("kind", ["ReLU", "ReLU6", "LeakyReLU", "Hardtanh", "Dropout"])
def test_bits_are_kept(kind: str, inplace: bool) -> None:
    layer = torch.compile(getattr(fk.nn, kind)(inplace=inplace), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 16, 16, requires_grad=True)

    def forward(t: Tensor) -> Tensor:
        return layer(t)

    forward(x * 1)  # compiles
    assert bytes_saved(lambda: forward(x * 1)) == x.numel() // 8


def test_a_byte_per_output_element_is_kept() -> None:
    layer = torch.compile(fk.nn.MaxPool2d(2), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    layer(x * 1)
    assert bytes_saved(lambda: layer(x * 1)) == x.numel() // 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: fk.nn.FreezableBatchNorm2d(4).eval(),
        lambda: fk.nn.AvgPool2d(2),
        lambda: fk.nn.ReflectionPad2d(1),
        lambda: fk.nn.FreezableConvTranspose2d(4, 4, 3),
    ],
    ids=["BatchNorm2d", "AvgPool2d", "ReflectionPad2d", "ConvTranspose2d"],
)
def test_nothing_of_the_input_is_kept(make: type[nn.Module]) -> None:
    inner = make().requires_grad_(False)
    layer = torch.compile(inner, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    layer(x * 1)
    parameters = sum(t.numel() for t in (*inner.parameters(), *inner.buffers())) * 4
    assert bytes_saved(lambda: layer(x * 1)) <= parameters + 64


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_dynamic_sizes(backend: str) -> None:
    """Torch's results over changing sizes, compiled no more often than stock: once for all under torch 2.13."""
    stock = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.ReflectionPad2d(1), nn.Dropout(0.0))
    counts: list[list[int]] = []
    for model in (fk.convert(copy.deepcopy(stock)), stock):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
        counts.append([])
        for n, height, width in ((2, 8, 9), (3, 10, 9), (5, 14, 12), (1, 8, 8)):
            x = torch.randn(
                n, 4, height, width, requires_grad=True
            )  # at first no two sizes equal: torch makes them one
            y, expected = compiled(x), stock(x)
            assert torch.equal(y, expected)
            (a,) = torch.autograd.grad(y.square().sum(), x)
            (b,) = torch.autograd.grad(expected.square().sum(), x)
            assert torch.equal(a, b)
            counts[-1].append(counter.frame_count)
    assert all(ours <= theirs for ours, theirs in zip(*counts, strict=True)), counts


def test_compiled_autograd() -> None:
    model = fk.convert(network()).requires_grad_(False)
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        model(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)
