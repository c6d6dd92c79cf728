"""torch.compile, compiled autograd and torch.export: one graph, one recompile a toggle, and no input kept."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import freezekit as fk
from freezekit.freezing import load_freeze_state
from freezekit.functional import conv2d_dgrad, conv2d_wgrad
from tests.dropin.twins import assert_same, gradients, nets, turns


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("first", [False, True], ids=["trains first", "frozen first"])
def test_one_recompile_a_toggle_and_none_back(first: bool, backend: str) -> None:
    ours, stock = nets()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    for step, frozen in enumerate((first, not first, first, not first)):
        (fk.freeze if frozen else fk.unfreeze)(ours, "2")
        stock[2].requires_grad_(not frozen)
        assert_same(gradients(compiled, x, ours), gradients(stock, x))
        assert counter.frame_count == min(step + 1, 2)


def test_a_freeze_that_ends_with_its_block_is_seen_too() -> None:
    net, _ = nets()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with fk.freeze(net, "2"):
        compiled(torch.randn(2, 3, 8, 8)).sum().backward()
    state = fk.freeze_state(net)
    compiled(torch.randn(2, 3, 8, 8)).sum().backward()
    assert net[2].weight.grad is not None
    net.zero_grad()
    with fk.freeze(net, "2"):
        compiled(torch.randn(2, 3, 8, 8)).sum().backward()
        assert net[2].weight.grad is None
        load_freeze_state(net, state)
        compiled(torch.randn(2, 3, 8, 8)).sum().backward()
        assert net[2].weight.grad is not None


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch 2.11 does not look at a flag again; `freeze` makes it")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_a_flag_set_by_hand_is_seen(backend: str) -> None:
    ours, stock = nets()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    for step, frozen in enumerate((False, True, False, True)):
        for net in (ours, stock):
            net[2].requires_grad_(not frozen)
        assert_same(gradients(compiled, x, ours), gradients(stock, x))
        assert counter.frame_count == min(step + 1, 2)


def test_a_flag_set_by_hand_is_seen_as_in_stock(way: str) -> None:
    """Under torch 2.11 that is: not at all."""
    counts = []
    for net in turns(way):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(net, backend=counter, fullgraph=True)
        counts.append([])
        for frozen in (False, True, False, True):
            net[2].requires_grad_(not frozen)
            compiled(torch.randn(2, 3, 8, 8)).sum().backward()
            counts[-1].append(counter.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("frozen", [False, True])
def test_dynamic_shapes_compile_once(frozen: bool, backend: str) -> None:
    """Over changing batches, heights and widths, forward and backward; stock compiles no less often."""
    counts = []
    ours, stock = nets()
    for net in (ours, stock):
        net[2].requires_grad_(not frozen)
    for net in (ours, stock):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
        for size in ((2, 3, 8, 9), (3, 3, 11, 9), (5, 3, 11, 14), (4, 3, 7, 7)):
            x = torch.randn(size)
            assert_same(gradients(compiled, x, net), gradients(stock, x))
        counts.append(counter.frame_count)
    assert counts[0] == 1 <= counts[1]


def test_a_size_that_was_marked_dynamic_compiles_once() -> None:
    ours, stock = nets()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for n, height in ((2, 8), (5, 8), (3, 12)):
        x = torch.randn(n, 3, height, 9, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 2)
        y = compiled(x)
        torch.testing.assert_close(y, stock(x))
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(dx, torch.autograd.grad(stock(x).square().sum(), x)[0])
    assert counter.frame_count == 1


def saved_sizes(kind: type[nn.Conv2d], backend: str, freeze: bool = True) -> list[torch.Size]:
    """Sizes of what the compiled step keeps for its backward pass, of a layer whose input is an activation."""
    torch._dynamo.reset()
    conv = kind(3, 4, 3, padding=1)
    conv.weight.requires_grad_(not freeze)
    compiled = torch.compile(lambda x: conv(x * 2).square(), backend=backend, fullgraph=True)
    y = compiled(torch.randn(2, 3, 16, 16, requires_grad=True))
    return [tensor.shape for tensor in y.grad_fn.saved_tensors]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_a_compiled_step_keeps_no_input_of_a_frozen_layer(backend: str) -> None:
    input_size = torch.Size((2, 3, 16, 16))
    assert input_size in saved_sizes(nn.Conv2d, backend)
    assert input_size not in saved_sizes(fk.FreezableConv2d, backend)
    assert input_size in saved_sizes(fk.FreezableConv2d, backend, freeze=False)


def test_a_compiled_step_runs_no_wgrad_of_a_frozen_layer() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    conv = fk.FreezableConv2d(3, 4, 3)
    conv.weight.requires_grad_(False)
    compiled = torch.compile(conv, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    compiled(torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert "freezekit.conv2d_dgrad.default" in names
    assert not any("wgrad" in name or "convolution_backward" in name for name in names)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd(backend: str, frozen: bool) -> None:
    ours, stock = nets()
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule) -> Any:
        graphs.append(graph)
        return torch.compile(graph, backend=backend, fullgraph=True)

    for net in (ours, stock):
        net[2].requires_grad_(not frozen)
    for n in (2, 2, 4):
        x = torch.randn(n, 3, 8, 8)
        expected = gradients(stock, x)
        leaf = x.clone().requires_grad_()
        ours.zero_grad()
        y = ours(leaf)
        with torch._dynamo.compiled_autograd._enable(compiler):
            y.square().sum().backward()
        assert_same({"y": y, "x": leaf.grad, **{k: p.grad for k, p in ours.named_parameters()}}, expected)
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("FreezekitConv2dBackward" in name for name in names) == 3
    assert len(graphs) <= 2  # the third batch size may make it dynamic once; the second call reuses the first graph


def test_compiled_autograd_keeps_hooks_and_double_backward_apart() -> None:
    conv, x = fk.FreezableConv2d(3, 4, 3), torch.randn(1, 3, 6, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = conv(x)
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        y.sum().backward()
    expected = torch.autograd.grad(conv(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_export_with_dynamic_sizes_and_back_from_a_file() -> None:
    net, _ = nets()
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4)}
    program = torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=(sizes,))
    other = torch.randn(5, 3, 11, 8)
    torch.testing.assert_close(program.module()(other), net(other))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(other), net(other))
    kept = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert kept.count("freezekit.conv2d.default") == 3


def test_a_frozen_layer_under_no_grad_and_inference_mode() -> None:
    ours, stock = nets()
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(x), stock(x))


def test_the_operators_compile_on_their_own() -> None:
    g, x, w = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return conv2d_dgrad(g, w, x.shape), conv2d_wgrad(g, x, w.shape)

    for ours, plain in zip(both(g, x, w), (conv2d_dgrad(g, w, x.shape), conv2d_wgrad(g, x, w.shape))):
        assert torch.equal(ours, plain)


def test_compiled_in_autocast() -> None:
    ours, stock = nets()
    ours[2].weight.requires_grad_(False)
    compiled = torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(2, 3, 8, 8)
        y = compiled(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, stock(x))
