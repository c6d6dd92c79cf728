"""A fused model in the hands of other tools: torch.save, torch.fx, parametrizations, pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import freezekit as fk
from freezekit.fusion import fuse, fusion_report, unfuse
from tests import fresh
from tests.fusion.alike import assert_alike
from tests.fusion.nets import Bottleneck, plain, settled

LOADS = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "freezekit":
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
import torch
model, x, y = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(model(x), y)
print(type(model).__name__, any(name.startswith("freezekit") for name in sys.modules))
"""


def image(channels: int = 8) -> Tensor:
    return torch.randn(2, channels, 8, 8, requires_grad=True)


@pytest.mark.parametrize("freezes", ["by flags", "by freeze"])
def test_what_is_saved_loads_without_freezekit(freezes: str, tmp_path: Path) -> None:
    model = settled(plain(2, 8))
    if freezes == "by freeze":
        fk.freeze(model.train().requires_grad_(True))
    fuse(model)
    x = image().detach()
    path = tmp_path / "model.pt"
    torch.save((model, x, model(x)), path)
    done = fresh.run(LOADS, str(path))
    assert done.stdout.split() == ["Sequential", "False"], done.stderr


def test_symbolic_traces_see_the_layers() -> None:
    model = fuse(settled(nn.Sequential(Bottleneck(8, 16), Bottleneck(16, 16))))
    traced = fx.symbolic_trace(model)
    x = image()
    torch.testing.assert_close(traced(x), model(x))
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    assert {"0.conv1", "0.downsample.1", "1.relu"} <= called
    assert not [node for node in traced.graph.nodes if "freezekit" in str(node.target)]


MADE: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "spectral_norm": spectral_norm,
    "weight_norm": weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral parametrization": parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MADE)
def test_weights_that_are_made_at_each_call(name: str, when: str) -> None:
    models = []
    for steps in ((MADE[name],), (fuse, MADE[name]) if when == "after" else (MADE[name], fuse)):
        torch.manual_seed(0)
        model = settled(plain(3, 8))
        for step in steps:
            step(model[3] if step is MADE[name] else model)
        models.append(model.requires_grad_(False).eval())
    stock, fused = models
    assert_alike(fused, stock, (image(),), 1e-4)
    rows = {row.conv: row for row in fusion_report(fused)}
    assert rows["0"].fused
    assert rows["6"].fused
    assert not rows["3"].fused


def test_a_class_that_others_made_of_a_fused_one_is_left_to_them() -> None:
    class Scale(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value * 2

    model = settled(Bottleneck(8, 16))
    model.factor = nn.Parameter(torch.ones(1), requires_grad=False)
    stock = copy.deepcopy(model)
    fuse(model)
    nn.utils.parametrize.register_parametrization(model, "factor", Scale())
    for change in (fuse, unfuse):
        assert change(model).factor.item() == 2
        assert_alike(model, stock, (image(),), 1e-4)
