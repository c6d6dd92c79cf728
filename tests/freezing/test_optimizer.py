"""Parameters out of the optimizer and back: groups, places, options, state; one optimizer and several."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Muon, Optimizer

from freezekit.freezing import freeze, freeze_state, load_freeze_state, unfreeze
from freezekit.freezing.bits import same_bits


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))


def names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def learn(model: nn.Module, optimizer: Any, seed: int = 0) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 2, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()


def test_parameters_return_to_their_own_group_place_and_options() -> None:
    model = net()
    groups = [
        {"params": [model[2].weight, model[0].weight], "lr": 0.1, "weight_decay": 0.5, "mine": "a"},
        {"params": [model[1].bias, model[0].bias, model[1].weight, model[2].bias], "lr": 0.2},
    ]
    optimizer = SGD(groups, momentum=0.9)
    learn(model, optimizer)
    whole = names(model, optimizer)
    first = freeze(model, "0", optimizer=optimizer, remove=True)
    freeze(model, "1.bias", "2.weight", optimizer=optimizer, remove=True)
    assert first.removed == ("0.weight", "0.bias")
    assert names(model, optimizer) == [[], ["1.weight", "2.bias"]]
    optimizer.param_groups[0]["lr"] = 0.05  # as a scheduler would
    result = unfreeze(model, "2", optimizer=optimizer)
    assert result.returned == ("2.weight",)
    assert names(model, optimizer) == [["2.weight"], ["1.weight", "2.bias"]]
    unfreeze(model, optimizer=optimizer)
    assert names(model, optimizer) == whole
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.param_groups[0]["mine"] == "a"


def test_groups_survive_load_state_dict_while_parameters_are_out() -> None:
    model = net()
    optimizer = Adam([{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.5}])
    learn(model, optimizer)
    whole = names(model, optimizer)
    kept = optimizer.state[model[1].weight]["exp_avg"].clone()
    freeze(model, "1", optimizer=optimizer, remove=True)
    optimizer.load_state_dict(optimizer.state_dict())  # replaces every group's dictionary
    unfreeze(model, "1", optimizer=optimizer)
    assert names(model, optimizer) == whole
    assert torch.equal(optimizer.state[model[1].weight]["exp_avg"], kept)


def test_a_group_added_meanwhile_and_a_parameter_added_to_a_group() -> None:
    model = net()
    optimizer = SGD(list(model[0].parameters()), lr=0.1)
    freeze(model, "0.weight", optimizer=optimizer, remove=True)
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.param_groups[0]["params"].append(model[2].weight)
    unfreeze(model, "0", optimizer=optimizer)
    assert names(model, optimizer) == [["0.weight", "0.bias", "2.weight"], ["1.weight", "1.bias"]]


def test_freezing_twice_keeps_the_first_way_back() -> None:
    model = net()
    optimizer = Adam(model.parameters())
    learn(model, optimizer)
    freeze(model, "0", optimizer=optimizer, remove=True)
    again = freeze(model, "0", optimizer=optimizer, remove=True)
    assert again.removed == ()
    assert again.already == ("0.weight", "0.bias")
    assert unfreeze(model, optimizer=optimizer).returned == ("0.weight", "0.bias")
    assert len(optimizer.state) == 6
    assert unfreeze(model, optimizer=optimizer).returned == ()


def test_kept_state_can_be_reset_while_it_is_out() -> None:
    model = net()
    optimizer = Adam(model.parameters())
    learn(model, optimizer)
    freeze(model, "0", optimizer=optimizer, remove=True, state="keep")
    result = unfreeze(model, "0", optimizer=optimizer, state="reset")
    assert result.reset == ("0.weight", "0.bias")
    assert model[0].weight not in optimizer.state
    learn(model, optimizer)
    assert optimizer.state[model[0].weight]["step"] == 1


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_momentum_of_some_does_not_break_the_fused_step(state: str) -> None:
    """torch's fused SGD fails on a group in which only some parameters have a momentum buffer."""
    models = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = net()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        freeze(model, "0", optimizer=optimizer)
        learn(model, optimizer)
        unfreeze(model, "0", optimizer=optimizer, state=state)
        learn(model, optimizer)
        unfreeze(model, "1", optimizer=optimizer, state="reset")
        learn(model, optimizer)
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_adagrad_which_makes_its_state_early(options: dict[str, bool]) -> None:
    """Adagrad fails at a parameter without state, so a reset gives it the state that a new one has."""
    model = net()
    optimizer = Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.25, **options)
    learn(model, optimizer)
    want = Adagrad([nn.Parameter(torch.zeros(2, 2))], initial_accumulator_value=0.25, **options).state_dict()["state"][
        0
    ]
    for remove in (False, True):
        freeze(model, "0", optimizer=optimizer, remove=remove, state="reset")
        unfreeze(model, "0", optimizer=optimizer)
        got = optimizer.state[model[0].weight]
        assert got.keys() == want.keys()
        assert all(same_bits(got[key], want[key]) for key in want)
        learn(model, optimizer)


def test_unknown_parameters_need_a_group() -> None:
    model = net()
    freeze(model, "0", "1")
    optimizer = Adagrad([{"params": [p]} for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=r"holds none of 1\.weight, 1\.bias .* pass group=") as error:
        unfreeze(model, "1", "2", optimizer=optimizer)
    assert "2.weight" not in str(error.value)
    assert not model[1].weight.requires_grad
    result = unfreeze(model, "1", optimizer=optimizer, group=1)
    assert result.returned == ("1.weight", "1.bias")
    assert names(model, optimizer) == [["2.weight"], ["2.bias", "1.weight", "1.bias"]]
    before = model[1].weight.clone()
    learn(model, optimizer)
    assert not torch.equal(model[1].weight, before)
    result.restore()
    assert names(model, optimizer) == [["2.weight"], ["2.bias"]]
    optimizer.load_state_dict(optimizer.state_dict())


def test_several_optimizers_share_a_model() -> None:
    model = net()
    muon = Muon([p for p in model.parameters() if p.ndim == 2], lr=0.1)
    adam = AdamW([p for p in model.parameters() if p.ndim == 1], lr=0.1)
    for optimizer in (muon, adam):
        learn(model, optimizer)
    result = freeze(model, "0", optimizer=[muon, adam], remove=True)
    assert result.removed == ("0.weight", "0.bias")
    assert names(model, muon) == [["1.weight", "2.weight"]]
    assert names(model, adam) == [["1.bias", "2.bias"]]
    with pytest.raises(ValueError, match=r"holds none of 0\.bias"):
        unfreeze(model, "0", optimizer=muon)
    with pytest.raises(ValueError, match="group: an index into one of 2 optimizers is ambiguous"):
        unfreeze(model, "0", optimizer=[muon, adam], group=0)
    assert unfreeze(model, "0", optimizer=[muon, adam]).returned == ("0.weight", "0.bias")
    assert names(model, muon)[0][0] == "0.weight"


def closure(model: nn.Module, optimizer: Optimizer) -> Any:
    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(torch.ones(4, 2)).square().sum()
        value.backward()
        return value

    return loss


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_moves_what_stays_in_it_and_so_must_let_it_go(search: str | None) -> None:
    model = net()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn=search)
    optimizer.step(closure(model, optimizer))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer.step(closure(model, optimizer))
    assert not torch.equal(model[0].weight, before), "the history over all parameters moves a frozen one"
    model[0].requires_grad_(True)
    for arguments in ({}, {"remove": True}, {"state": "reset"}):
        with pytest.raises(ValueError, match='to freeze some of them pass remove=True, state="reset"'):
            freeze(model, "0", optimizer=optimizer, **arguments)
        assert model[0].weight.requires_grad

    freeze(model, "0", optimizer=optimizer, remove=True, state="reset")
    before = model[0].weight.clone()
    rest = model[1].weight.clone()
    optimizer.step(closure(model, optimizer))
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[1].weight, rest)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match='to unfreeze some of them pass state="reset"'):
        unfreeze(model, "0", optimizer=optimizer)
    unfreeze(model, "0", optimizer=optimizer, state="reset")
    optimizer.step(closure(model, optimizer))
    assert not torch.equal(model[0].weight, before)


def test_lbfgs_over_other_parameters_is_not_asked() -> None:
    model = net()
    optimizer = LBFGS(model[1].parameters())
    optimizer.step(closure(model, optimizer))
    history = dict(optimizer.state)
    freeze(model, "0", optimizer=optimizer)
    assert dict(optimizer.state) == history


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"remove": True}, ValueError, "remove=True changes an optimizer, but there is none; pass optimizer="),
        ({"state": "reset"}, ValueError, 'state="reset" changes an optimizer, but there is none'),
        ({"state": "drop"}, ValueError, 'state must be "keep" or "reset", got \'drop\''),
        ({"norm": "eval"}, ValueError, 'norm must be "freeze" or "batch", got \'eval\''),
        ({"remove": 1}, TypeError, "remove must be True or False, got 1"),
        ({"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer or several, got int"),
    ],
)
def test_arguments_are_checked_before_anything_changes(arguments: dict, error: type[Exception], says: str) -> None:
    model = net()
    with pytest.raises(error) as caught:
        freeze(model, **arguments)
    assert says in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())


def test_group_must_be_an_index() -> None:
    model = net()
    optimizer = SGD(model.parameters())
    for wrong in (1, -1, "0"):
        with pytest.raises(ValueError, match="group must be an index from 0 to 0"):
            unfreeze(model, optimizer=optimizer, group=wrong)


def test_names_beside_the_parameters_follow_them() -> None:
    model = net()
    optimizer = SGD(model[:2].named_parameters(), lr=0.1)
    freeze(model, "0.weight", "1.weight", optimizer=optimizer, remove=True)
    assert optimizer.param_groups[0]["param_names"] == ["0.bias", "1.bias"]
    optimizer.load_state_dict(optimizer.state_dict())
    unfreeze(model, "0", optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.bias"]
    unfreeze(model, "2.bias", optimizer=optimizer, group=0)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.bias", "2.bias"]
    assert names(model, optimizer) == [["0.weight", "0.bias", "1.bias", "2.bias"]]


def test_a_copy_of_an_optimizer_is_told_how_it_learns_what_was_taken_out_of_the_original() -> None:
    model = net()
    optimizer = Adam(model.parameters(), lr=0.1)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    moment = optimizer.state[model[0].weight]["exp_avg"].clone()
    freeze(model, "0", optimizer=optimizer, remove=True)
    copied, steps_it = copy.deepcopy((model, optimizer))
    with pytest.raises(
        ValueError, match=r"(?s)holds none of 0.weight, 0.bias .*\nIf it is a copy or a pickle.*freeze_state"
    ):
        unfreeze(copied, "0", optimizer=steps_it)
    load_freeze_state(copied, freeze_state(model, optimizer), steps_it)
    assert unfreeze(copied, "0", optimizer=steps_it).returned == ("0.weight", "0.bias")
    assert names(copied, steps_it) == [[name for name, _ in copied.named_parameters()]]
    assert torch.equal(steps_it.state[copied[0].weight]["exp_avg"], moment)
    unfreeze(model, "0", optimizer=optimizer)
    assert optimizer.state[model[0].weight]["exp_avg"] is not steps_it.state[copied[0].weight]["exp_avg"]
