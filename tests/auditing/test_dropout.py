"""`audit` tells of dropout between frozen layers, and not of that before layers that learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from freezekit.auditing import audit
from tests.auditing.helpers import found

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def linear(*, frozen: bool) -> nn.Linear:
    return nn.Linear(4, 4).requires_grad_(not frozen)


def said(model: nn.Module, inputs: Any) -> set[str]:
    return {name for finding in found(audit(model, inputs=inputs), "active-dropout") for name in finding.names}


def stacked(*kinds: str) -> nn.Sequential:
    """Layers by letters: frozen, trainable, dropout, ReLU."""
    made: dict[str, Callable[[], nn.Module]] = {
        "f": lambda: linear(frozen=True),
        "t": lambda: linear(frozen=False),
        "d": nn.Dropout,
        "r": nn.ReLU,
    }
    return nn.Sequential(*(made[kind]() for kind in kinds))


@pytest.mark.parametrize("inputs", [None, X], ids=["looked at", "run"])
@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("fdft", {"1"}),
        ("frdrfrt", {"2"}),
        ("fdfdt", {"1"}),
        ("fdtdft", set()),
        ("dft", set()),
        ("fdt", set()),
        ("tdft", set()),
        ("ftdft", set()),
        ("fddft", {"1", "2"}),
    ],
)
def test_flat_sequences(kinds: str, expected: set[str], inputs: Tensor | None) -> None:
    model = stacked(*kinds)
    assert said(model, inputs) == expected
    assert said(model.eval(), inputs) == set()


@pytest.mark.parametrize("inputs", [None, X], ids=["looked at", "run"])
def test_sequences_in_sequences(inputs: Tensor | None) -> None:
    model = nn.Sequential(stacked("t", "f", "d"), stacked("f", "d"), linear(frozen=False))
    assert said(model, inputs) == {"0.2", "1.1"}  # the last is within a block that is frozen


@pytest.mark.parametrize("inputs", [None, X], ids=["looked at", "run"])
def test_a_dropout_that_is_in_a_sequence_twice(inputs: Tensor | None) -> None:
    drop = nn.Dropout()
    model = nn.Sequential(linear(frozen=False), drop, linear(frozen=True), drop, linear(frozen=True))
    assert said(model, inputs) == {"1"}


class Backbone(nn.Module):
    """Layers that its forward calls, as most do."""

    def __init__(self, *, adapter: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.drop = linear(frozen=True), linear(frozen=True), nn.Dropout()
        self.head = linear(frozen=False)
        self.adapter = linear(frozen=False) if adapter else None


class Between(Backbone):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.drop(self.first(x).relu()) * 2))


class Called(Backbone):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.dropout(self.first(x), 0.5, self.training)))


class BeforeHead(Backbone):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.second(self.first(x))))


class Towers(Backbone):
    """Both are dropped before the head; the second tower runs behind the first one's dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.first(x)) + self.drop(self.second(x)))


class Adapted(Backbone):
    """As LoRA: dropout before what learns, beside what is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.second(y) + self.adapter(self.drop(y))
        return self.head(y)


class AdaptedBehind(Backbone):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.drop(self.adapter(self.first(x)))))


class Gated(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.drop(self.first(x)) * self.gate))


class Residual(Backbone):
    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.first(x))
        return self.head(x + self.second(x))


class DropPath(nn.Module):
    """As timm's: no function that is known to drop."""

    drop_prob = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(len(x), 1).bernoulli_(1 - self.drop_prob)


class Branches(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.drop = DropPath()

    forward = Between.forward


class Normed(Backbone):
    def __init__(self) -> None:
        super().__init__()
        weight_norm(self.second)

    forward = Between.forward


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Between, {"drop"}),
        (Called, {"(root)"}),
        (BeforeHead, set()),
        (Towers, set()),
        (lambda: Adapted(adapter=True), set()),
        (lambda: AdaptedBehind(adapter=True), set()),
        (Gated, set()),
        (Residual, {"drop"}),
        (Branches, {"drop"}),
        (Normed, {"drop"}),
    ],
)
def test_forwards_of_their_own(make: Callable[[], nn.Module], expected: set[str]) -> None:
    model = make()
    assert said(model, X) == expected
    assert said(model.eval(), X) == set()
    assert said(model.train().requires_grad_(False), X) == set()  # nothing learns
