"""What `freeze` leaves behind for others: trainers that restore modes, pickles, GANs, lists of parameters."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from freezekit.freezing import NormWarning, PatternError, freeze, is_held, unfreeze
from tests import fresh


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3))


@pytest.mark.parametrize("restore", ["train()", "attribute"])
def test_a_norm_follows_the_model_again_after_a_trainer_restored_every_mode(restore: str) -> None:
    model = net().train()
    freeze(model, "1", norm="freeze")
    modes = {module: module.training for module in model.modules()}  # as Lightning does around validation
    model.eval()
    for module, mode in modes.items():
        if restore == "train()":
            module.train(mode)
        else:
            module.training = mode
    assert not model[1].training
    unfreeze(model, "1")
    assert model[1].training
    freeze(model, "1", norm="freeze")
    model.eval()
    unfreeze(model, "1")
    assert not model[1].training


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_norm_that_was_frozen_by_itself_follows_the_model_that_it_is_unfrozen_in(by_hand: bool) -> None:
    model = net().train()
    model[1].train(not by_hand)
    freeze(model[1], norm="freeze")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module, mode in modes.items():
        module.train(mode)
    unfreeze(model, "1")
    assert model[1].training is not by_hand


def test_a_norm_that_is_unfrozen_by_itself_stays_as_it_was_evaluated() -> None:
    model = net().train()
    freeze(model[1], norm="freeze")
    model.eval()
    unfreeze(model[1])
    assert not model[1].training


def test_it_follows_the_part_that_it_is_in() -> None:
    model = nn.ModuleDict({"backbone": net(), "head": net()}).train()
    model["backbone"].eval()
    freeze(model, norm="freeze")
    unfreeze(model)
    assert not model["backbone"][1].training
    assert model["head"][1].training


LOAD = """
import sys
sys.modules["freezekit"] = None  # importing it raises
import torch
model = torch.load(sys.argv[1], weights_only=False)
model.train()
assert not model[1].training and model[1].train() is model[1] and model[1].eval() is model[1]
before = model[1].running_mean.clone()
model(torch.randn(2, 3, 8, 8))
assert torch.equal(before, model[1].running_mean)
assert [p.requires_grad for p in model.parameters()] == [False] * 6
torch.save(model, sys.argv[1])
del model[1].train, model[1].reset_running_stats
assert model.train()[1].training
model[1].reset_running_stats()
assert not model[1].running_mean.any()
"""


@pytest.mark.parametrize("watched", [False, True])
def test_a_frozen_model_loads_and_stays_frozen_where_freezekit_is_not_installed(watched: bool, tmp_path: Path) -> None:
    model, path = net(), tmp_path / "model.pt"
    if watched:  # as before DDP wraps it
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        freeze(model, norm="freeze")
        assert bool(model._forward_pre_hooks) == watched
    finally:
        if watched:
            dist.destroy_process_group()
    torch.save(model, path)
    done = fresh.run(LOAD, str(path))
    assert done.returncode == 0, done.stderr
    again = torch.load(path, weights_only=False)  # saved there, loaded here
    assert is_held(again[1])
    assert not again.train()[1].training
    unfreeze(again)
    assert again[1].training
    assert all(p.requires_grad for p in again.parameters())


def generator_gradient(hold: str | None) -> torch.Tensor:
    """Of a step of a generator, its discriminator held still in some way and then let go."""
    torch.manual_seed(0)
    generator, discriminator = nn.Conv2d(2, 3, 1), net()
    if hold is None:
        discriminator.requires_grad_(False)
    else:
        freeze(discriminator, norm=hold)
    discriminator(generator(torch.randn(4, 2, 8, 8))).mean().backward()
    if hold is not None:
        unfreeze(discriminator)
        assert discriminator[1].training
    return generator.weight.grad


def test_freezing_a_discriminator_for_a_step_of_the_generator() -> None:
    stock = generator_gradient(None)
    assert torch.equal(generator_gradient("batch"), stock)
    assert not torch.allclose(generator_gradient("freeze"), stock)


def test_freeze_says_where_it_changes_what_is_computed() -> None:
    model = net()
    with pytest.warns(NormWarning, match=r"freeze: '1' went from train mode .* norm=\"batch\"") as caught:
        freeze(model)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze(model)  # is held already
        freeze(net(), norm="freeze")
        freeze(net(), norm="batch")
        freeze(net().eval())
        freeze(net(), "0", "3")


def test_lists_are_taken() -> None:
    for given in (["0", "1.*"], [["0"], ("1.weight", "1.bias")], None):
        model = net()
        if given is None:
            given = [*model[0].parameters(), *model[1].parameters()]
        assert freeze(model, given, norm="batch").params == ("0.weight", "0.bias", "1.weight", "1.bias")
    model = net()
    freeze(model, model[0].parameters(), model[1].parameters(), norm="batch")  # iterators
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2
    unfreeze(model, list(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())
    for take in (
        lambda model: dict(model[:2].named_parameters()).values(),
        lambda model: dict(model[:2].named_parameters()).keys(),
        lambda model: deque(model[:2].parameters()),
        lambda model: nn.ParameterList(model[:2].parameters()),
        lambda model: model[:2],
        lambda model: nn.ModuleList(model[:2]),
        lambda model: nn.ModuleDict({"a": model[0], "b": model[1]}),
    ):
        model = net()
        freeze(model, take(model), norm="batch")
        assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2
    with pytest.raises(PatternError, match="this Sequential is not part of the model"):
        freeze(model, nn.Sequential(model[0], nn.Conv2d(3, 3, 3)))
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_empty_list_is_not_everything() -> None:
    model = net()
    for empty in ([], (), [[]], iter(())):
        with pytest.raises(PatternError, match="selects nothing"):
            freeze(model, empty)
    assert all(p.requires_grad for p in model.parameters())


def test_a_wrong_pattern_is_told_in_two_lines() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3))
    for wrong in (torch.randn(64, 64), [torch.randn(64, 64)], dict(model.named_parameters()), 3, [None]):
        with pytest.raises(TypeError) as error:
            freeze(model, wrong)
        assert str(error.value).count("\n") == 1
        assert len(str(error.value)) < 400
    with pytest.raises(TypeError, match=r"got a Tensor of shape \(64, 64\), which is not a parameter"):
        freeze(model, torch.randn(64, 64))
    with pytest.raises(PatternError, match="not part of the model") as foreign:
        freeze(model, list(copy.deepcopy(model).parameters()))
    assert len(str(foreign.value)) < 400


def test_children_of_which_some_have_nothing_to_freeze() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2)).eval()
    freeze(model, list(model.children())[:3])
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2
    unfreeze(model, model.modules())
    assert all(p.requires_grad for p in model.parameters())
    for nothing in (model[2], [model[2]], [model[2], model[2]]):
        with pytest.raises(PatternError, match="this ReLU is not part of the model, or has nothing to freeze"):
            freeze(model, nothing)
    with pytest.raises(PatternError, match="this ReLU is not part"):
        freeze(model, [model[0], nn.ReLU()])
    assert all(p.requires_grad for p in model.parameters())
