"""Freezing a model through what wraps it, and models of odd kinds: names, modes, and nothing changed by a refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from freezekit.conversion import convert
from freezekit.distributed.watching import unwrapped, wrapper_prefix
from freezekit.freezing import PatternError, freeze, is_held, unfreeze
from freezekit.guarding import guard
from tests.freezing.guarded import learn


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def twice(model: nn.Module) -> nn.Module:
    return nn.DataParallel(compiled(model))


WRAPPERS = [nn.DataParallel, compiled, twice]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("meant", ["0", "0.weight", "0.w*", "[01].weight", nn.Linear, ["0", "*.1.bias"]], ids=str)
def test_names_inside_are_known(wrap: Callable[[nn.Module], nn.Module], meant: object) -> None:
    model, plain = net(), net()
    if isinstance(meant, list):  # one name of either kind
        plain_meant: object = ["0", "1.bias"]
    else:
        plain_meant = meant
    freeze(wrap(model), meant, norm="freeze")
    freeze(plain, plain_meant, norm="freeze")
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    prefix = wrapper_prefix(wrap(model))
    assert unfreeze(wrap(model), f"{prefix}0.weight").params == (f"{prefix}0.weight",)
    assert unwrapped(wrap(model)) is model


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_until_and_what_nothing_matches(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    freeze(wrap(model), until="2", norm="freeze")
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2
    wrap(model).train()
    assert not model[1].training
    with pytest.raises(PatternError, match=r"patterns: '3' matches no module or parameter"):
        unfreeze(wrap(model), "3")


def test_a_model_with_a_part_that_is_called_as_a_wrapper_calls_its_own() -> None:
    model = nn.ModuleDict({"module": net(), "head": nn.Linear(1, 1)})
    assert wrapper_prefix(model) == ""
    assert freeze(model, "module.0").params == ("module.0.weight", "module.0.bias")
    with pytest.raises(PatternError, match="'0' matches no module"):
        freeze(model, "0")


def test_conversion_knows_names_inside() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    convert(nn.DataParallel(model), only=["1"])
    assert [type(layer).__name__ for layer in model] == ["Conv2d", "FreezableConv2d"]


def test_a_wrapped_model_is_guarded() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    wrapped = compiled(model)
    freeze(wrapped, "0", "1", norm="freeze", optimizer=optimizer)
    with guard(wrapped, optimizer, every=1) as held:
        for _ in range(2):
            learn(model, optimizer)
        with held.allow("0"), torch.no_grad():
            model[0].weight.mul_(2)
        held.check()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_norm_is_held() -> None:
    model = torch.jit.script(net())
    freeze(model, norm="freeze")
    norm = dict(model.named_modules())["1"]
    model.train()
    before = norm.running_mean.clone()
    model(torch.randn(4, 4))
    assert is_held(norm)
    assert torch.equal(norm.running_mean, before)
    unfreeze(model)
    model(torch.randn(4, 4))
    assert not torch.equal(norm.running_mean, before)


def test_what_was_made_under_inference_mode_is_refused_before_anything_changes() -> None:
    with torch.inference_mode():
        last = nn.Linear(1, 1)
    model = nn.Sequential(nn.Linear(1, 1), last)
    freeze(model)
    with pytest.raises(ValueError, match=r"model: '1\.weight' cannot train, since it was made under torch\.inference"):
        unfreeze(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_model_on_the_meta_device_stays_frozen_when_it_gets_its_values() -> None:
    with torch.device("meta"):
        empty, assigned = net(), net()
    for model in (empty, assigned):
        freeze(model, "0", "1", norm="freeze")
    empty.to_empty(device="cpu")
    assigned.load_state_dict(net().state_dict(), assign=True)
    for model in (empty, assigned):
        assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2
        assert is_held(model.train()[1])
        assert not model[1].training
