"""Forwards as people write them: whatever stands between the layers of blocks runs as it is written."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from freezekit.fusion import fuse, fusion_report, unfuse
from tests.fusion.alike import assert_alike
from tests.fusion.nets import plain, settled


class Base(nn.Module):
    """Two convolutions, one with a norm, and what a forward may want besides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.head = nn.Conv2d(4, 4, 1)
        self.flag: bool | None = True
        self.calls, self.scales, self.skip = 0, [2.0], None

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class ReversesGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(Reverse.apply(self.act(self.norm(self.conv(x)))))


class NoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.act(self.norm(self.conv(x)))
        return self.head(h) + x


class Inference(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            h = self.act(self.norm(self.conv(x)))
        return self.head(h.clone())


class SwitchesAutocastOff(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.conv(x))
        with torch.autocast("cpu", enabled=False):
            return self.head(h.to(self.head.weight.dtype))


class SwitchesGradientsOff(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        torch.set_grad_enabled(False)
        y = self.norm(y)
        torch.set_grad_enabled(True)
        return self.act(y) + self.head(x)


class AsksForGradMode(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.conv(x))
        if torch.is_grad_enabled():
            return self.head(h) + h.mean()
        return self.head(h)


class SetsRequiresGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach()
        x.requires_grad = True
        return self.act(self.norm(self.conv(x)))


class CallsRequiresGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.act(self.conv(x))
            return torch.autograd.grad(y.sum(), x)[0] + self.head(x)


class HooksAGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 3)
        return self.act(y)


class DetachesBetween(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(self.norm(y.detach()) + y)


class OptionalSkip(Base):
    def forward(self, x: Tensor, skip: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        if skip is not None:
            x = x + skip
        return self.act(self.norm(self.conv(x))) * scale


class ComparesByIdentity(Base):
    def forward(self, x: Tensor, flag: object = None) -> Tensor:
        y = self.norm(self.conv(x))
        if flag is True:
            y = y * 2
        elif flag is None:
            y = self.act(y)
        return self.head(y)


class Checkpoints(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.features, x, use_reentrant=False))


class ChecksPointsOfSums(Base):
    """A residual block inside a checkpoint."""

    def inner(self, y: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(y)) + y)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, F.relu(self.head(x)), use_reentrant=False))


class MarksTensors(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.before = x
        return self.act(self.norm(y) + y.before)


class GatedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor, gate: Tensor | float = 2.0) -> Tensor:
        return super().forward(x) * gate


class NormOfTwo(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = GatedNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x), x))


class ListsAndDicts(Base):
    def forward(self, x: Tensor) -> dict[str, Any]:
        found = {"first": self.act(self.conv(x)), "list": []}
        for i in range(len(self.scales) + 1):
            found["list"].append(self.head(found["first"]) * i)
        return found


class ReturnsTuple(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.act(self.norm(self.conv(x))), self.head(x)


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.act(self.conv(x)) * self.calls * self.scales[0]


class BranchesOnValues(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) if x.sum() > 0 else self.head(x)


class Nested(Base):
    def forward(self, x: Tensor) -> Tensor:
        def inner(h: Tensor) -> Tensor:
            return self.act(self.norm(self.conv(h)) + y)

        y = self.conv(x)
        y = self.norm(y)
        return inner(y)


class Keywords(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(input=self.norm(input=self.conv(input=x)))
        return self.head(*[y])


class Deletes(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        del y
        return self.act(z)


class Writes(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        z = y
        y += 1
        return self.act(y) + z


class Frugal(Base):
    """Its convolution keeps no input: the ones below write to it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = fk.FreezableConv2d(4, 4, 3, padding=1), fk.FreezableConv2d(4, 4, 1)


class AddsInPlaceIntoInput(Frugal):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        kept = x
        x += self.norm(self.conv(x))
        return self.act(x) + kept


class AddsInPlaceIntoResult(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        kept = y
        y += self.head(x)
        return self.act(y) + kept


class MutatesSharedInput(Frugal):
    """Of two readers of one value the second comes after a write."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = F.relu(self.head(x))
        x.mul_(2)
        return F.relu(self.norm(self.conv(y)) + x)


class ReadsTwice(Base):
    """The first of two blocks adds what the second reads."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        y = F.relu(self.norm(self.conv(y)) + x)
        return F.relu(self.norm(self.conv(x)) + y)


class Raises(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.conv(x[:, :3])
        except RuntimeError:
            y = self.conv(x)
        return self.act(y)


class Loops(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            y = self.conv(x)
            x = self.act(self.norm(y))
        return x + y


class LoopsOverChildren(Base):
    """What a loop goes over stays what it was, and what is made in it sees the last child."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)])

    def renew(self, x: Tensor) -> Tensor:
        return x


class CallsTheLastChildLater(LoopsOverChildren):
    def forward(self, x: Tensor) -> Tensor:
        later = []
        for layer in self.layers:
            x = self.act(layer(x))
            later = [*later, lambda h: layer(h)]  # noqa: B023
        return later[0](x)


class AsksTheLastChildLater(LoopsOverChildren):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
            sizes = (layer.kernel_size[0] for _ in range(2))
        return x * sum(sizes)


class RenewsItsChildren(LoopsOverChildren):
    def renew(self, x: Tensor) -> Tensor:
        self.layers = nn.ModuleList(self.layers)
        return x

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
            x = self.renew(x)
        return x


class LosesItsChildren(LoopsOverChildren):
    def renew(self, x: Tensor) -> Tensor:
        self.kept = self.layers
        self.layers = nn.ModuleList()
        return x

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.layers):
            self.layers = self.kept
        for layer in self.layers:
            x = self.act(layer(x))
            x = self.renew(x)
        return x


class ExchangesAChild(RenewsItsChildren):
    def renew(self, x: Tensor) -> Tensor:
        self.layers[1] = self.head
        return x


class CheckpointsItsChildren(LoopsOverChildren):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.act(self.conv(x))


class ReadsItsChildren(LoopsOverChildren):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x * layer.weight.mean()
        return self.act(self.conv(x))


@dataclass
class Scale:
    """It cannot be hashed."""

    factor: float

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


scale = Scale(2.0)


class CallsAnObject(Base):
    def forward(self, x: Tensor) -> Tensor:
        return scale(self.act(self.conv(scale(x))))


class Draws(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.act(y) if random.random() < 2 else F.dropout(y)


class Shared(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.act(self.norm(self.conv(x))) + x)))


class Super(ReturnsTuple):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (*super().forward(x), self.act(self.head(x)))


class Private(Base):
    def __init__(self) -> None:
        super().__init__()
        self.__own = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.__own(x))


class NamesItself(Base):
    """By the name that its private names are spelled with, too."""

    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.__own = nn.Conv2d(4, 4, 1)

    @staticmethod
    def half(x: Tensor) -> Tensor:
        return x / 2

    def forward(self, x: Tensor) -> Tensor:
        y = NamesItself.half(self.act(self.norm(self.conv(x))))
        scales = [NamesItself.factor for _ in range(2)]
        return self.act(self.__own(y)) * sum(scales) if isinstance(self, NamesItself) else y


class _NamesItselfPrivately(Base):
    def __init__(self) -> None:
        super().__init__()
        self.__own = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return self.__own(y) * len(_NamesItselfPrivately.__mro__[:2])


class NamesItselfToSuper(ReturnsTuple):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.act(self.norm(self.conv(x)))
        return (*super(NamesItselfToSuper, self).forward(y), *super().forward(x))  # noqa: UP008


class Around(Base):
    """The class inside reads a global of its own name, and the name of the class around it."""

    class NoGrad(Base):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.norm(self.conv(x)))
            return y * 2 if isinstance(self, (NoGrad, Around)) else y * 3


def named_in_a_function() -> type[nn.Module]:
    class Local(Base):
        factor = 3.0

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(self.conv(x))) * Local.factor

    return Local


def _(x: Tensor) -> Tensor:
    return x * 3


def given_a_forward() -> type[nn.Module]:
    """One that stood in no class, and reads a global with the name that such a class would get."""

    def forward(self: Base, x: Tensor) -> Tensor:
        return _(self.act(self.norm(self.conv(x))))

    return type("Given", (Base,), {"forward": forward})


def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * function(*args, **kwargs)

    return wrapper


class Decorated(Base):
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class DecoratedNoGrad(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def closed_over(factor: float) -> type[nn.Module]:
    class Closure(Base):
        def forward(self, x: Tensor, power: int = 2) -> Tensor:
            return self.act(self.norm(self.conv(x))) * factor**power

    return Closure


NAME_A_CLASS = [
    NamesItself,
    _NamesItselfPrivately,
    NamesItselfToSuper,
    Around.NoGrad,
    named_in_a_function(),
    given_a_forward(),
]

KINDS = [
    *(ReversesGradient, NoGrad, Inference, SwitchesAutocastOff, SwitchesGradientsOff, AsksForGradMode),
    *(SetsRequiresGrad, CallsRequiresGrad, HooksAGradient, DetachesBetween, OptionalSkip, ComparesByIdentity),
    *(Checkpoints, ChecksPointsOfSums, MarksTensors, NormOfTwo, ListsAndDicts, ReturnsTuple, Counts),
    *(BranchesOnValues, Nested, Keywords, Deletes, Writes, AddsInPlaceIntoInput, AddsInPlaceIntoResult),
    *(
        MutatesSharedInput,
        ReadsTwice,
        Raises,
        Loops,
        CallsTheLastChildLater,
        AsksTheLastChildLater,
        RenewsItsChildren,
        LosesItsChildren,
        ExchangesAChild,
        CheckpointsItsChildren,
        ReadsItsChildren,
        CallsAnObject,
        Draws,
        Shared,
        Super,
        Private,
        Decorated,
        DecoratedNoGrad,
        closed_over(3.0),
        *NAME_A_CLASS,
    ),
]


def image(grad: bool = True) -> Tensor:
    return torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=grad)


def pair(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    stock = settled(kind()).double()
    return fuse(copy.deepcopy(stock)), stock


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_forward_is_stocks(kind: type[nn.Module]) -> None:
    fused, stock = pair(kind)
    for grad in (True, False):
        assert_alike(fused, stock, (image(grad),))
    if kind is OptionalSkip:
        assert_alike(fused, stock, (image(), image()))
    if kind is ComparesByIdentity:
        for flag in (True, False, 1):
            assert_alike(fused, stock, (image(), flag))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not issubclass(kind, Frugal)])
def test_in_every_mode_and_with_some_of_it_trainable(kind: type[nn.Module]) -> None:
    fused, stock = pair(kind)
    with torch.no_grad():
        assert_alike(fused, stock, (image(False),))
    for name in ("conv", "norm", "head"):
        for model in (fused, stock):
            model.requires_grad_(False).get_submodule(name).requires_grad_(True)
        assert_alike(fused, stock, (image(),))
    for model in (fused, stock):
        model.train()
    assert_alike(fused, stock, (image(),))
    assert torch.equal(fused.norm.running_mean, stock.norm.running_mean)
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(
            fused.float().eval().requires_grad_(False),
            stock.float().eval().requires_grad_(False),
            (image().float(),),
            0.1,
        )


FUSES_WHOLE = [ReversesGradient, NoGrad, Inference, OptionalSkip, Checkpoints, AsksForGradMode, ReturnsTuple, Shared]
FUSES_WHOLE += NAME_A_CLASS


@pytest.mark.parametrize("kind", FUSES_WHOLE)
def test_what_stands_around_layers_does_not_keep_them_from_fusing(kind: type[nn.Module]) -> None:
    fused, _ = pair(kind)
    rows = fusion_report(fused)
    assert [row.activation for row in rows if row.conv == "conv" and row.fused][:1] == ["relu"]


class NormsInTheCaller(Base):
    """As DenseNet's layers: one method runs the convolution, another the norm behind it."""

    def reduced(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.reduced(x))))


def test_a_convolution_whose_norm_another_method_runs_is_said_to_be_alone() -> None:
    fused, stock = pair(NormsInTheCaller)
    rows = {row.conv: str(row) for row in fusion_report(fused)}
    assert rows["conv"] == "conv: fused, the convolution alone"
    assert_alike(fused, stock, (image(),))


UNREADABLE = {
    Decorated: "its forward is wrapped by a decorator",
    Raises: "no forward that could be read calls it by this name",
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_not_fused_is_reported(kind: type[nn.Module]) -> None:
    reasons = {row.conv: row.reason for row in fusion_report(pair(kind)[0]) if not row.fused}
    assert reasons["conv"] == UNREADABLE[kind]


def test_a_forward_made_from_text_is_left() -> None:
    space: dict[str, Any] = {"Base": Base}
    exec("class Made(Base):\n    def forward(self, x):\n        return self.act(self.conv(x))\n", space)
    fused, stock = pair(space["Made"])
    assert "the source of its forward cannot be read" in {row.reason for row in fusion_report(fused)}
    assert_alike(fused, stock, (image(),))


class Other(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


def test_a_source_that_is_not_what_runs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an edit of the file: the text that is found says something else."""
    code = Other.forward.__code__
    monkeypatch.setattr(Other.forward, "__code__", code.replace(co_firstlineno=Reads.forward.__code__.co_firstlineno))
    fused = fuse(settled(Other()))
    assert "the source of its forward is not what runs" in {row.reason for row in fusion_report(fused)}


class Reads(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.head(x))


class LooksAtItself(Base):
    def forward(self, x: Tensor) -> list[str]:
        y = self.act(self.conv(x))
        return sorted(name for name in locals() if y is not None)


def test_a_forward_that_looks_at_its_variables_is_left() -> None:
    fused = fuse(settled(LooksAtItself()))
    assert fused(image(False).float()) == ["self", "x", "y"]
    assert "calls locals()" in fusion_report(fused)[0].reason


def test_what_a_forward_that_is_left_contains_is_fused() -> None:
    model = LooksAtItself()
    model.inner = plain(1, 4)
    rows = {row.conv: row for row in fusion_report(fuse(settled(model)))}
    assert rows["inner.0"].fused
    assert not rows["conv"].fused


class AddsAnArgument(Base):
    def forward(self, x: Tensor, skip: Tensor | float | None = None) -> Tensor:
        return self.act(self.norm(self.conv(x)) + skip)


class Decides(Base):
    """By plain attributes, between the layers of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = None
        self.last = None
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv(x)
        out = self.norm(out)
        if self.gate is not None:
            out = self.gate(out)
        if self.flag and not self.training:
            out += identity
        out = self.act(out)
        for layer in self.layers:
            out = layer(out)
        return out if self.last is None else self.last(out)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a flag": lambda m: setattr(m, "flag", None),
    "training": lambda m: m.train(),
    "a layer that was missing": lambda m: setattr(m, "gate", nn.Hardswish()),
    "another layer": lambda m: setattr(m, "act", nn.Tanh()),
    "a norm that is none": lambda m: setattr(m, "norm", nn.Identity()),
    "a layer of a list": lambda m: m.layers.append(nn.Sigmoid()),
    "a layer less": lambda m: m.layers.__delitem__(1),
    "no norm": lambda m: setattr(m, "norm", None),
    "no activation": lambda m: setattr(m, "act", None),
    "the end": lambda m: setattr(m, "last", nn.Tanh()),
    "a forward of its own": lambda m: setattr(m.conv, "forward", lambda x: x * 2),
    "a forward of the model's own": lambda m: setattr(m, "forward", lambda x: x * 2),
    "a hook": lambda m: m.norm.register_forward_hook(lambda layer, args, y: y * 2) and None,
    "a hook that changes siblings": lambda m: (
        m.conv.register_forward_hook(lambda layer, args, y: setattr(m, "norm", nn.Identity())) and None
    ),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "thawed": lambda m: m.requires_grad_(True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_forward_decides_by_is_asked_at_each_call(name: str) -> None:
    fused, stock = pair(Decides)
    assert str(fusion_report(fused)[0]) == "conv + norm + add + relu: fused"
    assert_alike(fused, stock, (image(),))
    for model in (fused, stock):
        CHANGES[name](model)
    if name in ("no norm", "no activation"):
        for model in (fused, stock):
            with pytest.raises(TypeError, match="'NoneType' object is not callable"):
                model(image())
        return
    for _ in range(2):
        assert_alike(fused, stock, (image(),))


def test_a_residual_that_is_none_is_not_passed_over() -> None:
    fused, stock = pair(AddsAnArgument)
    assert_alike(fused, stock, (image(), image()))
    for model in (fused, stock):
        with pytest.raises(TypeError, match="unsupported operand"):
            model(image())
    assert_alike(fused, stock, (image(), 2.0))


def test_a_method_that_is_replaced_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, stock = pair(Checkpoints)
    monkeypatch.setattr(Checkpoints, "features", lambda self, x: self.conv(x) - 1)
    assert_alike(fused, stock, (image(),))
    monkeypatch.setattr(Checkpoints, "forward", lambda self, x: self.features(x) * 2)
    assert_alike(fused, stock, (image(),))
    fused.features = stock.features = lambda x: x
    assert_alike(fused, stock, (image(),))


def test_tracebacks_and_signatures_are_the_forwards_own() -> None:
    import inspect

    fused, stock = pair(OptionalSkip)
    assert inspect.signature(fused.forward) == inspect.signature(stock.forward)
    with pytest.raises(RuntimeError) as caught:
        fused(torch.randn(1, 3, 4, 4, dtype=torch.float64))
    frames = [(str(entry.path), entry.lineno + 1) for entry in caught.traceback]
    lines, start = inspect.getsourcelines(OptionalSkip.forward)
    assert any(path == __file__ and start <= line < start + len(lines) for path, line in frames)


def test_only_modules_can_be_fused() -> None:
    with pytest.raises(TypeError, match="model must be an nn.Module, got int"):
        fuse(3)


def test_bare_convolutions_are_left() -> None:
    conv = fuse(nn.Conv2d(3, 3, 1))
    assert type(conv) is nn.Conv2d
    assert "no module contains it" in fusion_report(conv)[0].reason


def test_slices_are_models_of_their_own() -> None:
    model = fuse(settled(plain(2, 4)))
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(model[3:](model[:3](x)), model(x))


def test_layers_may_come_and_go() -> None:
    model = fuse(settled(plain(2, 4)).double())
    for change in (
        lambda m: m.append(settled(plain(1, 4)).double()),
        lambda m: m.pop(0),
        lambda m: m.__setitem__(0, nn.Identity()),
    ):
        change(model)
        assert_alike(model, unfuse(copy.deepcopy(model)), (image(),))
