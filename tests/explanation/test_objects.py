"""Models whose forward takes or returns dataclasses, objects and containers of classes of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freezekit as fk
from freezekit.auditing import audit
from freezekit.planning import Machine
from tests.auditing.helpers import found

MACHINE = Machine(flops=1e9, bandwidth=1e9)
X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Output:
    logits: Tensor
    name: str = ""


@dataclass(frozen=True, slots=True)
class Slotted:
    logits: Tensor


class Items(dict[str, Any]):
    @property
    def logits(self) -> Tensor:
        return self["logits"]


class Listed(list[Tensor]):
    @property
    def logits(self) -> Tensor:
        return self[0]


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": Output,
    "slots": Slotted,
    "object": lambda y: SimpleNamespace(logits=y),
    "nested": lambda y: SimpleNamespace(logits=y, more=SimpleNamespace(y=[Output(y)])),
    "dictionary": lambda y: Items(logits=y),
    "list": lambda y: Listed([y]),
}


class First(nn.Conv2d):
    wrap: Callable[[Tensor], Any]

    def forward(self, x: Any) -> Any:
        return self.wrap(super().forward(x.logits))


class Two(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = First(3, 4, 3), First(4, 4, 3)
        self.first.wrap = self.second.wrap = wrap

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("measure", [None, True])
def test_layers_that_pass_objects_on_are_explained(wrap: str, measure: bool | None) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    expected = [replace(row, name="", layer="", advice="") for row in fk.explain(plain, X, measure=measure)]
    model = Two(WRAPS[wrap])
    rows = [replace(row, name="", layer="", advice="") for row in fk.explain(model, (WRAPS[wrap](X),), measure=measure)]
    assert rows == expected


@pytest.mark.parametrize("wrap", WRAPS)
def test_plans_and_audits_see_what_is_returned(wrap: str) -> None:
    plain = fk.plan(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), X, machine=MACHINE)
    model, given = Two(WRAPS[wrap]), (WRAPS[wrap](X),)
    made = fk.plan(model, given, machine=MACHINE, measure=True)
    assert [option.bytes_kept for option in made] == [
        option.bytes_kept for option in plain
    ]  # with what the input needs
    assert [option.backward_flops for option in made] == [option.backward_flops for option in plain]
    assert all(option.measured_bytes == option.bytes_kept for option in made)
    assert [bool(option.measured_seconds) for option in made] == [bool(option.backward_flops) for option in plain]
    assert not found(audit(model, inputs=given), "no-gradient")
    assert not WRAPS[wrap](X).logits.requires_grad


def test_an_input_on_meta_in_an_object_is_not_run_on_data() -> None:
    model = Two(Output)
    assert len(fk.explain(model, (Output(X.to("meta")),))) == 2
    with pytest.raises(ValueError, match="must hold data"):
        fk.explain(model, (Output(X.to("meta")),), measure=True)
