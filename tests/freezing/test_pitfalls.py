"""What goes wrong when people freeze layers: each pitfall as stock torch has it, and gone with freezekit.

The first half of each test shows that the trap is real in this torch; if torch mends it, that half says so.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from freezekit.freezing import freeze, unfreeze


def trained(kind: type[Optimizer], **options: Any) -> tuple[nn.Module, Optimizer]:
    """Two layers and an optimizer that has made a step, so that momentum is there and gradients are left."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = kind(model.parameters(), lr=0.1, **options)
    learn(model, optimizer)
    return model, optimizer


def backward(model: nn.Module) -> None:
    model(torch.randn(8, 3)).square().sum().backward()


def learn(model: nn.Module, optimizer: Optimizer, to_none: bool = True) -> None:
    optimizer.zero_grad(set_to_none=to_none)
    backward(model)
    optimizer.step()


MOVED_BY_ZEROS = [
    (SGD, {"momentum": 0.9}, True),
    (SGD, {"weight_decay": 0.1}, True),
    (Adam, {}, True),
    (AdamW, {}, True),
    (SGD, {}, False),
    (RMSprop, {}, False),
    (Adagrad, {}, False),
]


@pytest.mark.parametrize(("kind", "options", "moves"), MOVED_BY_ZEROS)
def test_zero_gradients_still_move_frozen_weights(
    kind: type[Optimizer], options: dict[str, float], moves: bool
) -> None:
    model, optimizer = trained(kind, **options)
    weight = model[0].weight
    weight.requires_grad_(False)  # step one alone
    before = weight.clone()
    learn(model, optimizer, to_none=False)
    assert torch.equal(weight, before) is not moves

    model, optimizer = trained(kind, **options)
    weight = model[0].weight
    freeze(model, "0", optimizer=optimizer)
    before = weight.clone()
    for _ in range(3):
        learn(model, optimizer, to_none=False)
        assert weight.grad is None
    assert torch.equal(weight, before)


def test_freezing_between_backward_and_step_steps_once_more() -> None:
    for use_freeze in (False, True):
        model, optimizer = trained(SGD)
        backward(model)
        before = model[0].weight.clone()
        if use_freeze:
            freeze(model, "0")
        else:
            model[0].weight.requires_grad_(False)
        optimizer.step()
        assert torch.equal(model[0].weight, before) is use_freeze


def test_freezing_between_forward_and_backward_accumulates_nothing() -> None:
    model, _ = trained(SGD)
    loss = model(torch.randn(8, 3)).sum()
    freeze(model, "0")
    loss.backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_a_gradient_left_on_a_removed_parameter_is_counted_in_the_norm() -> None:
    model, optimizer = trained(SGD)
    optimizer.param_groups[0]["params"] = list(model[2].parameters())
    model[0].weight.requires_grad_(False)
    optimizer.zero_grad()
    assert model[0].weight.grad is not None
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0

    model, optimizer = trained(SGD)
    freeze(model, "0", "1", optimizer=optimizer, remove=True)
    optimizer.zero_grad()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == 0


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_state_left_without_a_group_breaks_the_state_dict(state: str) -> None:
    model, optimizer = trained(Adam)
    optimizer.param_groups[0]["params"].remove(next(iter(optimizer.param_groups[0]["params"])))
    with pytest.raises(KeyError):
        optimizer.state_dict()
    freeze(model, "0", optimizer=optimizer, state=state)
    optimizer.load_state_dict(optimizer.state_dict())  # mended, wherever the orphan came from

    model, optimizer = trained(Adam)
    freeze(model, "0", optimizer=optimizer, remove=True, state=state)
    assert len(optimizer.state_dict()["state"]) == 4
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(("kind", "options"), [(SGD, {"momentum": 0.9}), (Adam, {}), (AdamW, {"weight_decay": 0.0})])
@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("when", ["freeze", "unfreeze"])
def test_stale_momentum_moves_at_unfreeze(kind: type[Optimizer], options: dict, remove: bool, when: str) -> None:
    for reset in (False, True):
        model, optimizer = trained(kind, **options)
        policy = {when: "reset"} if reset else {}
        freeze(model, "0", optimizer=optimizer, remove=remove, state=policy.get("freeze", "keep"))
        unfreeze(model, "0", optimizer=optimizer, state=policy.get("unfreeze", "keep"))
        before = model[0].weight.clone()
        model[0].weight.grad = torch.zeros_like(before)
        optimizer.step()
        assert torch.equal(model[0].weight, before) is reset


def test_running_statistics_move_in_train() -> None:
    model, _ = trained(SGD)
    for use_freeze in (False, True):
        if use_freeze:
            freeze(model, "1")
        else:
            for param in model[1].parameters():
                param.requires_grad_(False)
        before = copy.deepcopy(model[1].state_dict())
        model.train()
        model(torch.randn(8, 3))
        same = all(torch.equal(before[name], value) for name, value in model[1].state_dict().items())
        assert same is use_freeze


def test_two_layers_of_equal_values_are_two() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    optimizer = SGD(model.parameters(), lr=0.1)
    freeze(model, "0", optimizer=optimizer, remove=True)
    assert model[1].weight.requires_grad
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model[1].parameters()]


def test_a_module_flag_freezes_nothing_and_the_error_of_a_typo_is_loud() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.requires_grad = False  # silent in torch
    assert model[0].weight.requires_grad
    with pytest.raises(ValueError, match="near names: '0\\.weight'"):
        freeze(model, "0.wieght")


def test_weight_decay_of_an_optimizer_that_zeroes() -> None:
    """Zeroed gradients and weight decay: frozen weights shrink a little in each of many steps."""
    for use_freeze in (False, True):
        model, optimizer = trained(SGD, weight_decay=0.01)
        start = model[0].weight.detach().clone()
        if use_freeze:
            freeze(model, "0", optimizer=optimizer)
        else:
            model[0].requires_grad_(False)
        for _ in range(20):
            learn(model, optimizer, to_none=False)
        ratio = (model[0].weight.norm() / start.norm()).item()
        assert ratio == 1.0 if use_freeze else 0.90 < ratio < 0.99
