"""`explain` counts without data what a step with data keeps, in every dtype and under autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import freezekit as fk
from freezekit._inputs import arguments
from freezekit.conversion import SWAPS
from freezekit.explanation.trace import trace
from tests.enabled.test_second_order import CHAINS, layer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*[x.flatten(2).transpose(1, 2)] * 3, need_weights=False)[0]


def block() -> nn.Module:
    """Under autocast its norm has an input that is narrower than its parameters."""
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{kind.__name__: (lambda kind=kind: layer(kind)) for kind in SWAPS},
    **{
        name: (lambda make=make: (make(), torch.randn(2, 4, 4, 4)))
        for name, make in {**CHAINS, "block": block, "Attention": Attention}.items()
    },
}


NONE = ("AvgPool3d", "bfloat16")  # torch has no such pool on a CPU


@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in MODELS for way in ("autocast", "bfloat16") if (name, way) != NONE]
)
def test_bytes_without_data_are_those_with_data(name: str, way: str, converted: bool) -> None:
    model, x = MODELS[name]()
    if converted:
        fk.convert(model)
    if way == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    given = arguments(x.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        without, with_data = (trace(model, given, measure).bytes_kept for measure in (False, True))
    assert without == with_data
