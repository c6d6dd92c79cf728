"""Blocks: what freeze and unfreeze changed is as before at their end, and values are left alone."""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

from freezekit.freezing import Frozen, freeze, is_held, unfreeze


def trained() -> tuple[nn.Module, Optimizer]:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    optimizer = Adam([{"params": model[0].parameters()}, {"params": [*model[1].parameters(), *model[2].parameters()]}])
    learn(model, optimizer)
    return model, optimizer


def learn(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()


def structure(model: nn.Module, optimizer: Optimizer) -> Any:
    return (
        [(p.requires_grad, id(p.grad)) for p in model.parameters()],
        [(m.training, is_held(m)) for m in model.modules()],
        [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        {id(p): {k: id(v) for k, v in state.items()} for p, state in optimizer.state.items()},
    )


CHOICES = itertools.product((False, True), ("keep", "reset"), ("freeze", "batch"))
ALL = [{"remove": remove, "state": state, "norm": norm} for remove, state, norm in CHOICES]


@pytest.mark.parametrize("arguments", ALL, ids=str)
def test_freeze_restores_flags_gradients_modes_groups_and_state(arguments: dict) -> None:
    model, optimizer = trained()
    model[0].bias.requires_grad_(False)  # frozen before: so it stays
    before = structure(model, optimizer)
    grad = model[2].weight.grad.clone()
    with freeze(model, optimizer=optimizer, **arguments) as frozen:
        assert isinstance(frozen, Frozen)
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert structure(model, optimizer) == before
    assert torch.equal(model[2].weight.grad, grad)


@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("state", ["keep", "reset"])
def test_unfreeze_restores_the_freeze_around_it(remove: bool, state: str) -> None:
    model, optimizer = trained()
    freeze(model, "0", "1", optimizer=optimizer, remove=remove)
    before = structure(model, optimizer)
    with unfreeze(model, "0", "1", optimizer=optimizer, state=state):
        assert model[1].training
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
        learn(model, optimizer)
    after = structure(model, optimizer)
    assert after[:3] == (before[0][:4] + after[0][4:], before[1], before[2])
    assert after[0][:4] == before[0][:4]
    optimizer.load_state_dict(optimizer.state_dict())


def test_lbfgs_has_its_history_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 2)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = structure(model, optimizer)
    with freeze(model, "0", optimizer=optimizer, remove=True, state="reset"):
        optimizer.step(closure)
        optimizer.zero_grad()
    after = structure(model, optimizer)
    assert after[2:] == before[2:]
    optimizer.step(closure)


def test_values_that_trained_in_the_block_stay() -> None:
    model, optimizer = trained()
    with freeze(model, "0", optimizer=optimizer, remove=True):
        learn(model, optimizer)
        head = model[2].weight.clone()
    assert torch.equal(model[2].weight, head)
    first = model[0].weight.clone()
    learn(model, optimizer)
    assert not torch.equal(model[0].weight, first)


def test_blocks_nest_and_do_not_undo_what_others_did() -> None:
    model, optimizer = trained()
    with freeze(model, "0", optimizer=optimizer, remove=True):
        freeze(model, "2", optimizer=optimizer, remove=True)  # meant to last
        with unfreeze(model, "0.weight", optimizer=optimizer):
            assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
        assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert not model[2].weight.requires_grad


def test_the_block_follows_the_mode_of_the_model() -> None:
    model, _ = trained()
    with freeze(model):
        model.eval()
    assert not model[1].training


def test_an_error_in_the_block_restores_too() -> None:
    model, optimizer = trained()
    before = structure(model, optimizer)
    with pytest.raises(KeyError, match="mine"), freeze(model, optimizer=optimizer, remove=True, state="reset"):
        raise KeyError("mine")
    assert structure(model, optimizer) == before


def test_restore_works_once_and_without_a_block() -> None:
    model, optimizer = trained()
    frozen = freeze(model, "0", optimizer=optimizer)
    frozen.restore()
    assert model[0].weight.requires_grad
    freeze(model, "0")
    frozen.restore()
    assert not model[0].weight.requires_grad, "a second restore must do nothing"


def test_an_accumulated_gradient_goes_on_after_the_block() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    x = torch.ones(1, 2)
    model(x).sum().backward()
    with freeze(model):
        model(x.requires_grad_()).sum().backward()
    model(x).sum().backward()
    assert torch.equal(model[0].weight.grad, torch.full((1, 2), 2.0))


def test_the_result_says_what_changed() -> None:
    model, optimizer = trained()
    model[0].bias.requires_grad_(False)
    model[0].bias.grad = None
    result = freeze(model, "0", "1", optimizer=optimizer, remove=True, state="reset")
    assert result.params == ("0.weight", "1.weight", "1.bias")
    assert result.already == ("0.bias",)
    assert result.norms == ("1",)
    assert result.grads == ("0.weight", "1.weight", "1.bias")
    assert result.reset == result.removed == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert repr(result).splitlines() == [
        "freeze: 3 parameters (0.weight, 1.weight, 1.bias)",
        "  already so: 0.bias",
        "  statistics: 1",
        "  .grad dropped: 0.weight, 1.weight, 1.bias",
        "  out of the optimizer: 0.weight, 0.bias, 1.weight, 1.bias",
        "  state reset: 0.weight, 0.bias, 1.weight, 1.bias",
    ]
    many = freeze(nn.Sequential(*(nn.Linear(1, 1) for _ in range(5))))
    assert repr(many) == "freeze: 10 parameters (0.weight, 0.bias, 1.weight, 1.bias, 2.weight, 2.bias, and 4 more)"


def test_gradients_are_let_go_with_the_result() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    grad = weakref.ref(model[0].weight.grad)
    freeze(model, optimizer=SGD(model.parameters()))
    assert grad() is None


def test_parameters_that_were_assigned_in_the_block_get_the_flags_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with freeze(model, "0"):
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        assert not model[0].weight.requires_grad
    assert all(param.requires_grad for param in model.parameters())
    model.requires_grad_(False)
    with unfreeze(model, "0"):
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert not any(param.requires_grad for param in model.parameters())


def test_gradients_follow_a_conversion_in_the_block() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    before = [param.grad.clone() for param in model.parameters()]
    with freeze(model, "0"):
        model.double()
    assert all(torch.equal(param.grad, grad.double()) for param, grad in zip(model.parameters(), before, strict=True))
