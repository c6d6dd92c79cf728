"""Code that asks for a module's exact class, or writes to it, meets the class that its author wrote."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from freezekit.conversion import conversion_report, convert
from freezekit.fusion import fuse, fusion_report, unfuse
from tests.fusion.alike import assert_alike
from tests.fusion.nets import settled


class Block(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class AsksForItsOwn(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return y if type(self) is AsksForItsOwn else y * 2


class AsksInAProperty(Block):
    @property
    def scale(self) -> float:
        return 1.0 if self.__class__ == AsksInAProperty else 3.0

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) * self.scale


class CountsCalls(Block):
    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return self.act(self.norm(self.conv(x))) * CountsCalls.calls


class CountsInAClassmethod(Block):
    @classmethod
    def count(cls) -> None:
        cls.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        self.count()
        return self.act(self.norm(self.conv(x))) * CountsInAClassmethod.calls


class NamesItsBaseByItsClass(Block):
    """Wrong for subclasses, where it calls itself for ever; as older networks override `train`."""

    def train(self, mode: bool = True) -> NamesItsBaseByItsClass:
        return super(self.__class__, self).train(False)


class AsksForOthers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([Block(), nn.Sequential(Block(), Block())])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.body:
            if type(part) is Block or self._is_sequence(part):
                x = part(x)
        return x

    @staticmethod
    def _is_sequence(part: nn.Module) -> bool:
        return part.__class__ in {nn.Sequential}


class AsksForLayers(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input) if type(layer) is nn.Conv2d else layer(input) * 2
        return input


class ComparesLayers(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return input if type(self[0]) is type(self[-1]) else super().forward(input)


class FreezesNorms(nn.Sequential):
    def train(self, mode: bool = True) -> FreezesNorms:
        super().train(mode)
        for layer in self.modules():
            if type(layer) is nn.BatchNorm2d:
                layer.eval()
        return self


class Harmless(Block):
    def forward(self, x: Any) -> Tensor:
        if type(x) is tuple or type(x) in (list, torch.Size) or type(self.act) is nn.Sequential:
            raise TypeError(f"{type(x)} {type(self).__name__} {self.__class__.calls}")
        return self.act(self.norm(self.conv(x)))

    @classmethod
    def like(cls) -> Block:
        return cls()

    def fuse_model(self) -> list[nn.Module]:
        return [m for m in self.modules() if type(m) is nn.Conv2d]


def image() -> Tensor:
    return torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "kind",
    [AsksForItsOwn, AsksInAProperty, CountsCalls, CountsInAClassmethod, NamesItsBaseByItsClass, AsksForOthers],
)
def test_a_class_that_its_code_looks_at_stays(kind: type[nn.Module]) -> None:
    stock = settled(kind()).double()
    fused = fuse(copy.deepcopy(stock))
    kind.calls = 0
    fused.eval()(image())
    assert getattr(kind, "calls", 0) == kind.__name__.startswith("Counts")
    for part, other in zip(fused.modules(), stock.modules(), strict=True):
        assert type(part) is type(other)
    if not kind.__name__.startswith("Counts"):
        assert_alike(fused, stock, (image(),))
    assert all("exact class" in row.reason and not row.fused for row in fusion_report(fused))


def test_what_is_the_same_for_every_class_keeps_nothing_from_fusing() -> None:
    stock = settled(Harmless()).double()
    fused = fuse(copy.deepcopy(stock))
    assert [row.fused for row in fusion_report(fused)] == [True]
    assert_alike(fused, stock, (image(),))


def test_layers_whose_class_a_forward_asks_for_are_not_converted() -> None:
    stock = AsksForLayers(nn.Conv2d(4, 4, 1), nn.ReLU()).double()
    model = convert(copy.deepcopy(stock))
    assert_alike(model, stock, (image(),))
    conv, relu = conversion_report(model)
    assert (conv.status, relu.status) == ("left alone", "freezekit")
    assert "exact class" in conv.reason
    unknown = convert(ComparesLayers(nn.Conv2d(4, 4, 1), nn.ReLU()))
    assert {row.status for row in conversion_report(unknown)} == {"left alone"}
    trained = convert(FreezesNorms(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).train()
    assert not trained[1].training
    # Behind another module's back nobody looks.
    beside = convert(nn.Sequential(AsksForLayers(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 1)))
    assert [row.status for row in conversion_report(beside)] == ["left alone", "freezekit"]


@pytest.mark.parametrize(("kind", "method"), [(nn.ReLU, "forward"), (nn.Conv2d, "_conv_forward")])
def test_layers_of_a_class_that_was_given_another_forward_are_not_converted(
    kind: type[nn.Module], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, x, *more: own(self, x + 1, *more))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4).eval()).double()
    assert_alike(convert(copy.deepcopy(model)), model, (image(),))
    (row,) = (row for row in conversion_report(model) if row.status == "left alone")
    assert f"{kind.__name__} has another {method}" in row.reason


@pytest.mark.parametrize(
    "forward", [torch.sigmoid, functools.partialmethod(nn.ReLU.forward), torch.compiler.disable(lambda self, x: x + 1)]
)
def test_another_forward_may_be_anything_that_can_be_called(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a function of torch's, from another of its modules."""
    monkeypatch.setattr(nn.ReLU, "forward", forward)
    x = torch.linspace(-1, 1, 5)
    model = convert(nn.Sequential(nn.ReLU()))
    assert type(model[0]) is nn.ReLU
    assert torch.equal(model(x), nn.ReLU()(x))
    assert [row.status for row in conversion_report(model)] == ["left alone"]


def test_a_traced_graph_that_is_fused_may_be_edited() -> None:
    stock = settled(Block()).double()
    graph = fuse(fx.symbolic_trace(copy.deepcopy(stock)))
    assert any(row.fused for row in fusion_report(graph))
    x = image()
    expected = stock(x)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_before(output):
        output.args = (graph.graph.call_function(torch.neg, output.args),)
    graph.recompile()
    torch.testing.assert_close(graph(x), -expected)
    torch.testing.assert_close(fuse(graph)(x), -expected)
    torch.testing.assert_close(unfuse(graph)(x), -expected)
