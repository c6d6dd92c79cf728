"""TorchScript, fx and torch.ao: each works, or says clearly what to do instead."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from freezekit.functional import conv2d
from tests.dropin.twins import net, nets

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def test_jit_trace_and_back_from_a_file() -> None:
    ours, stock = nets()
    traced = torch.jit.trace(ours, X)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    more = torch.cat([X, X + 1])
    torch.testing.assert_close(loaded(more), stock(more))
    leaf = more.clone().requires_grad_()
    loaded(leaf).sum().backward()
    other = more.clone().requires_grad_()
    stock(other).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    assert not any(node.kind().startswith("freezekit::") for node in traced.inlined_graph.nodes())


def test_a_trace_is_torch_s_with_gradients_and_without() -> None:
    """It loads without freezekit; and torch's own check traces again without gradients, for the same graph."""
    model = fk.convert(
        nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.ReflectionPad2d(1), nn.AvgPool2d(2), nn.Dropout(0.0))
    )
    kinds = []
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            graph = torch.jit.trace(model, X.clone().requires_grad_()).inlined_graph
            kinds.append([node.kind() for node in graph.nodes()])
    assert kinds[0] == kinds[1]
    assert not any(kind.startswith("freezekit::") for kind in kinds[0])


def test_jit_script_says_what_to_do() -> None:
    for module in (fk.FreezableConv2d(3, 4, 3), net(fk.FreezableConv2d)):
        with pytest.raises(RuntimeError, match=r"FreezableConv2d.*torch\.jit\.trace.*torch\.compile"):
            torch.jit.script(module)
    for name in fk.nn.__all__:
        kind = getattr(fk.nn, name)
        with pytest.raises(RuntimeError, match=rf"cannot compile a {name}: .*revert"):
            torch.jit.script(nn.Sequential(kind.__new__(kind)))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.rest = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.up(self.norm(self.conv(x)) + 1))


@pytest.mark.parametrize("traced_in", [True, False], ids=["train", "eval"])
def test_a_traced_model_still_follows_train_and_eval(traced_in: bool) -> None:
    stock = Mixed().train(traced_in)
    ours = torch.fx.symbolic_trace(fk.convert(copy.deepcopy(stock)))
    for training in (True, False, True):
        results = []
        for model in (ours, stock):
            torch.manual_seed(0)
            results.append(model.train(training)(X))
        torch.testing.assert_close(*results)
    torch.testing.assert_close(ours.norm.running_mean, stock.norm.running_mean)


def test_fx_traces_to_the_function() -> None:
    ours, stock = nets()
    graph = torch.fx.symbolic_trace(ours)
    assert torch.equal(graph(X), stock(X))
    assert sum(node.target is conv2d for node in graph.graph.nodes) == 3
    again = torch.fx.symbolic_trace(graph)
    assert torch.equal(again(X), stock(X))


def test_fx_takes_a_function_too() -> None:
    graph = torch.fx.symbolic_trace(lambda x, w: conv2d(x, w, padding="same"))
    w = torch.randn(4, 3, 3, 3)
    assert torch.equal(graph(X, w), conv2d(X, w, padding="same"))


def test_fuse_modules_names_the_layer_it_does_not_know() -> None:
    from torch.ao.quantization import fuse_modules

    model = nn.Sequential(fk.FreezableConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with pytest.raises((AssertionError, NotImplementedError), match="FreezableConv2d"):
        fuse_modules(model, [["0", "1", "2"]])


def test_quantization_leaves_the_layer_in_float_and_the_layer_says_so() -> None:
    from torch.ao.quantization import DeQuantStub, QuantStub, convert, get_default_qconfig, prepare

    model = nn.Sequential(QuantStub(), fk.FreezableConv2d(3, 4, 3), DeQuantStub()).eval()
    model.qconfig = get_default_qconfig("x86")
    prepared = prepare(model)
    prepared(X)
    quantized = convert(prepared)
    assert type(quantized[1]) is fk.FreezableConv2d
    with pytest.raises(NotImplementedError, match=r"input must not be quantized.*nn\.Conv2d"):
        quantized(X)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("training", [False, True])
def test_audit_tells_of_converted_layers_that_quantization_passes_over(training: bool) -> None:
    from torch.ao.quantization import get_default_qat_qconfig, get_default_qconfig, prepare, prepare_qat

    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).train(training)
    stock.qconfig = get_default_qat_qconfig("x86") if training else get_default_qconfig("x86")
    stock[2].qconfig = None
    ask = prepare_qat if training else prepare
    missed = fk.convert(copy.deepcopy(stock))
    for model in (missed, ask(missed)):  # in time, and too late
        (finding,) = [finding for finding in fk.audit(model) if finding.code == "not-quantized"]
        assert (finding.severity, finding.names) == ("error", ("0", "1"))
    for fine in (fk.convert(copy.deepcopy(stock[2:])), ask(fk.revert(fk.convert(copy.deepcopy(stock))))):
        assert "not-quantized" not in {finding.code for finding in fk.audit(fine)}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("kind", [nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Dropout])
def test_audit_says_nothing_of_converted_layers_that_take_quantized_tensors_as_they_are(kind: type[nn.Module]) -> None:
    from torch.ao.quantization import DeQuantStub, QuantStub, convert, get_default_qconfig, prepare

    args = (2,) if "Pool" in kind.__name__ else ()
    stock = nn.Sequential(QuantStub(), nn.Conv2d(3, 4, 3), kind(*args), DeQuantStub()).eval()
    stock.qconfig = get_default_qconfig("x86")
    ours = fk.convert(copy.deepcopy(stock), only=[kind])
    assert type(ours[2]) is not kind
    prepared = [prepare(model) for model in (stock, ours)]
    for model in prepared:
        model(X)
    assert "not-quantized" not in {finding.code for finding in fk.audit(prepared[1])}
    expected, got = (convert(model)(X) for model in prepared)
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 1), nn.BatchNorm2d(3)], ids=str)
def test_quantization_by_fx_tells_that_it_passes_over_converted_layers(layer: nn.Module, training: bool) -> None:
    from torch.ao.quantization import QConfigMapping, get_default_qat_qconfig, get_default_qconfig
    from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

    stock = nn.Sequential(layer, nn.ReLU(), nn.Dropout(0.5)).train(training)
    settings = QConfigMapping().set_global((get_default_qat_qconfig if training else get_default_qconfig)("x86"))
    prepare = prepare_qat_fx if training else prepare_fx
    with pytest.warns(UserWarning, match=r"in float: call freezekit\.revert\(model\) before prepare"):
        prepare(fk.convert(copy.deepcopy(stock)), settings, (X,))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*freezekit")
        torch.fx.symbolic_trace(fk.convert(copy.deepcopy(stock)))
        for fine in (fk.revert(fk.convert(copy.deepcopy(stock))), fk.convert(copy.deepcopy(stock[1:]))):
            prepare(fine, settings, (X,))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantization_by_fx_tells_a_model_that_calls_freezekit_itself_what_to_call() -> None:
    from torch.ao.quantization import QConfigMapping, get_default_qconfig
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    class Calls(nn.Conv2d):
        conv2d = staticmethod(conv2d)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    settings = QConfigMapping().set_global(get_default_qconfig("x86"))
    with pytest.warns(UserWarning, match=r"calls freezekit\.functional, write torch\.nn\.functional$"):
        prepare_fx(nn.Sequential(Calls(3, 4, 3)).eval(), settings, (X,))
    Calls.conv2d = staticmethod(F.conv2d)
    prepared = prepare_fx(nn.Sequential(Calls(3, 4, 3)).eval(), settings, (X,))
    prepared(X)
    assert "quantized.conv2d" in convert_fx(prepared).code


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_frozen_norms_and_quantization_aware_training() -> None:
    """What docs/enable.md says of them."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    def prepared(norm: str | None) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
        if norm is not None:
            fk.freeze(model, norm=norm)
        return prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (X,))

    with pytest.raises(AssertionError, match="must be in the same mode"):
        prepared("freeze")
    assert not [param for param in prepared("batch").parameters() if param.requires_grad]
    late = prepared(None)
    fk.freeze(late, "0", norm="freeze")
    norm = late.train().get_submodule("0.bn")
    before = norm.running_mean.clone()
    late(X)
    assert torch.equal(before, norm.running_mean)
    assert fk.freezing.is_held(norm)


def test_as_stock_layers_it_quantizes() -> None:
    from torch.ao.quantization import DeQuantStub, QuantStub, convert, get_default_qconfig, prepare

    model = nn.Sequential(QuantStub(), fk.FreezableConv2d(3, 4, 3), DeQuantStub()).eval()
    for module in model.modules():
        if type(module) is fk.FreezableConv2d:
            module.__class__ = nn.Conv2d
    expected = model[1](X)
    model.qconfig = get_default_qconfig("x86")
    prepared = prepare(model)
    prepared(X)
    assert (convert(prepared)(X) - expected).abs().max() < 0.2
