"""``until``: what comes before a layer, by registration and by the order of calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from freezekit.freezing import PatternError, freeze
from freezekit.freezing.patterns import select


class Backwards(nn.Module):
    """Registers its layers in the reverse of the order in which it calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.first = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.first(x * self.gain) + torch.rand(()) * 0
        x = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return self.last(self.norm(x)) * scale


def test_registration_order_stops_before_the_layer() -> None:
    found = select(Backwards(), [], until="norm")
    assert list(found.params) == ["gain", "unused.weight", "unused.bias", "last.weight", "last.bias"]
    assert not found.norms


def test_call_order_with_inputs() -> None:
    found = select(Backwards(), [], until="last", inputs=torch.ones(3, 2))
    assert list(found.params) == [
        "gain",
        "norm.weight",
        "norm.bias",
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
        "first.0.weight",
        "first.0.bias",
    ]
    assert list(found.norms) == ["norm"]
    assert not select(Backwards(), [], until="norm", inputs=torch.ones(3, 2)).norms


@pytest.mark.parametrize("inputs", [torch.ones(3, 2), (torch.ones(3, 2), 2.0), {"x": torch.ones(3, 2), "scale": 2.0}])
def test_inputs_may_be_a_tensor_a_tuple_or_keywords(inputs: object) -> None:
    assert "first.0.weight" in select(Backwards(), [], until="attention", inputs=inputs).params


def test_the_traced_forward_leaves_no_trace() -> None:
    model = Backwards()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    freeze(model, until="last", inputs=torch.ones(3, 2))
    assert torch.equal(torch.get_rng_state(), state)
    model.norm.training = False
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_failing_forward_puts_the_modes_back() -> None:
    model = Backwards()
    with pytest.raises(RuntimeError, match="must match the size"):
        freeze(model, until="last", inputs=torch.ones(3, 5))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_parameter_name_and_a_nested_layer() -> None:
    assert list(select(Backwards(), [], until="unused.bias").params) == ["gain", "unused.weight"]
    found = select(nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), nn.Linear(1, 1)), [], until="0.1")
    assert list(found.params) == ["0.0.weight", "0.0.bias"]


def test_a_list_counts_from_its_first_call() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.stem = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for stage in self.stages:
                x = stage(self.stem(x))
            return x

    assert list(select(Stages(), [], until="stages", inputs=torch.ones(1, 2)).params) == ["stem.weight", "stem.bias"]


def test_what_is_shared_with_the_layer_stays_trainable() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    for inputs in (None, torch.ones(1, 2)):
        assert list(select(model, [], until="2", inputs=inputs).params) == ["0.bias", "1.weight", "1.bias"]


def test_until_adds_to_patterns() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    assert list(select(model, ["2.bias"], until="1").params) == ["0.weight", "0.bias", "2.bias"]


def test_errors() -> None:
    model = Backwards()
    with pytest.raises(PatternError, match=r"until: 'lst' matches no module .* near names: 'last'"):
        freeze(model, until="lst")
    with pytest.raises(PatternError, match="until: nothing with parameters comes before '0'"):
        freeze(nn.Sequential(nn.Linear(1, 1)), until="0")
    with pytest.raises(ValueError, match="until: 'unused' was not called"):
        freeze(model, until="unused", inputs=torch.ones(3, 2))
    with pytest.raises(ValueError, match="inputs: only read to find the forward order for until="):
        freeze(model, inputs=torch.ones(3, 2))
    with pytest.raises(TypeError, match="until must be the name"):
        freeze(model, until=3)
