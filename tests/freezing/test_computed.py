"""Weights that are computed at each forward: a pattern that means one means all that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from freezekit.freezing import PatternError, freeze, is_held, unfreeze
from freezekit.freezing.index import computed
from freezekit.freezing.patterns import select
from freezekit.guarding import guard
from freezekit.schedules import FreezeOut, layers_of

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
ORIGINAL = "parametrizations.weight.original"


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.scale


class Equalised:
    """A hook that computes a weight and is none of torch's, as equalised learning rates have it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: Any) -> None:
        setattr(module, self.name, getattr(module, f"{self.name}_orig") * 2)


def equalised(layer: nn.Linear) -> nn.Linear:
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_orig", weight)
    layer.weight = weight.data
    layer.register_forward_pre_hook(Equalised("weight"))
    return layer


def learns_scale(layer: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


def pruned(layer: nn.Linear) -> nn.Linear:
    return prune.l1_unstructured(layer, "weight", 0.5)


def pruned_direction(layer: nn.Linear) -> nn.Linear:
    return prune.l1_unstructured(nn.utils.weight_norm(layer), "weight_v", 0.5)


def pruned_twice(layer: nn.Linear) -> nn.Linear:
    return prune.random_unstructured(pruned(layer), "weight", 0.2)


def pruned_and_scaled(layer: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(pruned(layer), "weight_orig", Scaled())
    return layer


def both(layer: nn.Linear) -> nn.Linear:
    return learns_scale(parametrizations.weight_norm(layer))


WAYS: dict[Callable[[nn.Linear], nn.Module], list[str]] = {
    parametrizations.weight_norm: [f"{ORIGINAL}0", f"{ORIGINAL}1"],
    parametrizations.spectral_norm: [ORIGINAL],
    parametrizations.orthogonal: [ORIGINAL],
    learns_scale: ["parametrizations.weight.0.scale", ORIGINAL],
    both: ["parametrizations.weight.1.scale", f"{ORIGINAL}0", f"{ORIGINAL}1"],
    nn.utils.weight_norm: ["weight_g", "weight_v"],
    nn.utils.spectral_norm: ["weight_orig"],
    pruned: ["weight_orig"],
    pruned_twice: ["weight_orig"],
    pruned_direction: ["weight_g", "weight_v_orig"],
    pruned_and_scaled: ["parametrizations.weight_orig.0.scale", "parametrizations.weight_orig.original"],
    equalised: ["weight_orig"],
}
SPECTRAL = (parametrizations.spectral_norm, nn.utils.spectral_norm)
ways = pytest.mark.parametrize("wrap", WAYS, ids=lambda wrap: f"{wrap.__module__.rpartition('.')[2]}.{wrap.__name__}")
MEANT = ["*.weight", "0.weight", "0.we*t", ["0.weight", "1.weight"], "?.weight*"]


def net(wrap: Callable[[nn.Linear], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(3, 3)), nn.Linear(3, 1))
    model(torch.randn(2, 3))
    return model


def learn(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        model.train()(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()


def weight_in_use(model: nn.Module) -> torch.Tensor:
    """The first layer's weight in a forward in train mode."""
    model.train()(torch.zeros(1, 3))
    return model[0].weight.detach().clone()


@ways
def test_what_a_weight_is_made_of(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    model = net(wrap)
    assert sorted(computed(model[0])["weight"]) == sorted(WAYS[wrap])
    with torch.no_grad():
        model(torch.zeros(1, 3))  # a hook leaves a tensor without history then
    assert sorted(computed(model[0])["weight"]) == sorted(WAYS[wrap])


@ways
@pytest.mark.parametrize("meant", MEANT, ids=str)
def test_nothing_that_a_pattern_means_moves(wrap: Callable[[nn.Linear], nn.Module], meant: Any) -> None:
    model = net(wrap)
    result = freeze(model, meant, norm="freeze")
    assert {f"0.{name}" for name in WAYS[wrap]} <= set(result.params)
    assert model[0].bias.requires_grad
    before, bias = weight_in_use(model), model[0].bias.clone()
    learn(model)
    assert torch.equal(weight_in_use(model), before)
    assert not torch.equal(model[0].bias, bias)
    unfreeze(model, meant)
    learn(model)
    assert not torch.equal(weight_in_use(model), before)


@ways
def test_freezing_what_it_is_made_of_by_name_is_the_same(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    model = net(wrap)
    freeze(model, [f"0.{name}" for name in WAYS[wrap]], norm="freeze")
    before = weight_in_use(model)
    learn(model)
    assert torch.equal(weight_in_use(model), before)
    assert any(map(is_held, model.modules())) == (wrap in SPECTRAL)


@pytest.mark.parametrize("wrap", SPECTRAL)
def test_spectral_norm_is_released_with_its_weight_alone(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    model = net(wrap)
    freeze(model, norm="freeze")
    unfreeze(model, "0.bias")
    assert any(map(is_held, model.modules()))
    unfreeze(model, "*.weight")
    assert not any(map(is_held, model.modules()))


@ways
def test_a_schedule_has_one_layer_of_it_and_freezes_all(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    model = net(wrap)
    layers = layers_of(model)
    assert [layer.name for layer in layers] == ["0", "1"]
    assert sorted(layers[0].parameters) == sorted(["0.bias", *(f"0.{name}" for name in WAYS[wrap])])
    schedule = FreezeOut(model, 0.5, 4)
    while not schedule.step():
        pass
    before = weight_in_use(model)
    learn(model)
    assert torch.equal(weight_in_use(model), before)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.spectral_norm, pruned])
def test_until_says_what_to_name(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    model = net(wrap)
    state = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(PatternError, match=r"'0\.weight' is no parameter, but computed from .*: name these$") as error:
        select(model, [], until="0.weight")
    assert all(repr(f"0.{name}") in str(error.value) for name in WAYS[wrap])
    assert all(torch.equal(a, b) for a, b in zip(state, model.buffers(), strict=True))


def test_what_is_named_alike_and_not_computed_is_left_alone() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.ones(2, 2)
            self.weight_scale = nn.Parameter(torch.ones(2))
            self.weight_mask = nn.Parameter(torch.ones(2))

    model = nn.ModuleDict({"q": Quantised(), "plain": nn.Linear(2, 2)})
    assert list(select(model, ["*.weight"]).params) == ["plain.weight"]
    with pytest.raises(PatternError, match=r"'q\.weight' matches no module"):
        select(model, ["q.weight"])


def test_names_that_read_as_globs() -> None:
    model = nn.ModuleDict({"a[b]": pruned(nn.Linear(2, 2)), "ab": pruned(nn.Linear(2, 2))})
    assert list(select(model, ["a[b].weight"]).params) == ["a[b].weight_orig"]


def test_a_weight_that_was_put_in_by_a_computation_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1]._parameters["weight"] = model[0].weight * 2  # as libraries for meta-learning do
    with pytest.raises(ValueError, match=r"model: '1\.weight' cannot be frozen, since a computation put it"):
        freeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_guard_allows_by_the_same_names() -> None:
    model = net(nn.utils.weight_norm)
    freeze(model, "*.weight")
    with guard(model, torch.optim.SGD([model[1].bias]), every=1) as held, torch.no_grad():
        with held.allow("0.weight"):
            model[0].weight_g.mul_(2)
        held.check()
