"""What a forward decides by is watched; what cannot be watched is not rewritten, and the report says why."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freezekit.fusion import fuse, fusion_report, unfuse
from tests.fusion.nets import plain, settled


class Case(nn.Module):
    """A module whose forward is given."""

    def __init__(self, body: Callable[[Case, Tensor], Tensor], **attributes: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        for name, value in attributes.items():
            setattr(self, name, value)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return type(self).call(self, x)


def case(body: Callable[..., Tensor], **attributes: object) -> nn.Module:
    kind = type("Case", (Case,), {"forward": lambda self, x: body(self, x)})
    model = kind(body, **attributes)
    return settled(model)


def counted(self: nn.Module, x: Tensor) -> Tensor:
    self.calls += 1
    return self.conv(x)


UNTRACEABLE = {
    "sets self.calls": (counted, {"calls": 0}),
    "reads self.scales, a list": (lambda self, x: self.conv(x) * self.scales[0], {"scales": [2.0]}),
    "asks for the type of a value": (lambda self, x: self.conv(x if isinstance(x, Tensor) else x[0]), {}),
    "calls rand on no input": (lambda self, x: self.conv(x) if torch.rand(1) < 2 else x, {}),
    "draws random numbers": (lambda self, x: self.conv(x) if random.random() < 2 else x, {}),
    "torch.fx cannot trace it": (lambda self, x: self.conv(x) if x.sum() > -1e9 else x, {}),
}


@pytest.mark.parametrize("reason", UNTRACEABLE)
def test_untraceable_forwards_stay_and_are_reported(reason: str) -> None:
    body, attributes = UNTRACEABLE[reason]
    model = fuse(case(body, **attributes))
    (row,) = fusion_report(model)
    assert not row.fused
    assert reason in row.reason
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(model(x), model.conv(x) * (2 if "list" in reason else 1))


def test_what_an_untraceable_model_contains_is_fused() -> None:
    model = case(lambda self, x: self.inner(x) if x.sum() > -1e9 else x, inner=plain(1, 4))
    rows = {row.conv: row for row in fusion_report(fuse(model))}
    assert rows["inner.0"].fused
    assert not rows["conv"].fused


def check(model: nn.Module, change: Callable[[], object]) -> None:
    """After a change the fused model does what the stock one does."""
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    fuse(model)(x)
    change()
    ours = model(x)
    torch.testing.assert_close(ours, unfuse(model)(x))


def test_flags_that_forward_reads_are_watched() -> None:
    model = case(lambda self, x: self.conv(x) * (self.factor if self.training else 3), factor=5.0)
    check(model, model.train)
    fuse(model)
    check(model, lambda: setattr(model, "factor", 7.0))


def test_layers_may_come_and_go() -> None:
    model = settled(plain(2, 4))
    check(model, lambda: model.append(settled(plain(1, 4))))
    check(model, lambda: model.pop(0))
    check(model, lambda: model.__setitem__(0, nn.Identity()))


def test_lists_of_modules_and_missing_layers_are_watched() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if self.last is None else self.last(x)

    model = case(body, layers=nn.ModuleList([nn.Conv2d(4, 4, 1), nn.ReLU()]), last=None)
    check(model, lambda: model.layers.append(nn.Sigmoid()))
    check(model, lambda: setattr(model, "last", nn.Tanh()))
    check(model, lambda: setattr(model, "last", None))


def test_a_replaced_forward_is_obeyed() -> None:
    model = case(lambda self, x: F.relu(self.conv(x)))
    kind = type(model)

    def replace() -> None:
        kind.forward = lambda self, x: self.conv(x) - 1

    check(model, replace)


def test_slices_are_models_of_their_own() -> None:
    model = fuse(settled(plain(2, 4)))
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(model[3:](model[:3](x)), model(x))


def test_only_modules_can_be_fused() -> None:
    with pytest.raises(TypeError, match="model must be an nn.Module, got int"):
        fuse(3)


def test_bare_convolutions_and_script_modules_are_left() -> None:
    conv = fuse(nn.Conv2d(3, 3, 1))
    assert type(conv) is nn.Conv2d
    assert "nothing stands around it" in fusion_report(conv)[0].reason
